//! The documents tell of things that exist.

use kiln_tests::repository;
use std::fs;

/// Words in backquotes that look like paths of the repository: they hold a slash, or end like a
/// file.
fn paths(text: &str) -> Vec<&str> {
    let code = text.split('`').skip(1).step_by(2);
    code.filter(|word| {
        let file = [".rs", ".toml", ".md", ".py", ".json"]
            .iter()
            .any(|end| word.ends_with(end));
        let path = word
            .chars()
            .all(|char| char.is_ascii_alphanumeric() || "-_./".contains(char));
        path && (word.contains('/') && !word.starts_with('/') || file)
    })
    .collect()
}

#[test]
fn architecture_names_paths_that_exist() {
    let text = fs::read_to_string(repository("ARCHITECTURE.md")).unwrap();
    let found = paths(&text);
    assert!(found.len() > 10, "{found:?}");
    for path in found {
        assert!(
            repository(path).exists(),
            "ARCHITECTURE.md names {path}, which does not exist"
        );
    }
}

#[test]
fn readme_names_scripts_that_exist() {
    let text = fs::read_to_string(repository("README.md")).unwrap();
    for script in ["scripts/quickstart", "scripts/check"] {
        assert!(text.contains(script), "README.md does not name {script}");
        assert!(repository(script).exists());
    }
}
