//! Which targets of a bundle a GPU can run.

use kiln_bundle::Target;

/// Architectures that `kilnc --target` knows, for advice.
const KNOWN: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"];

/// An architecture of machine code, such as `sm_86`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Arch {
    major: u32,
    minor: u32,
    /// `sm_90a`: uses what only this capability has.
    specific: bool,
}

impl Arch {
    /// None where the name is no CUDA architecture.
    fn parse(name: &str) -> Option<Arch> {
        let rest = name.strip_prefix("sm_")?;
        let (digits, specific) = match rest.strip_suffix('a') {
            Some(digits) => (digits, true),
            None => (rest, false),
        };
        if digits.len() < 2 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let number: u32 = digits.parse().ok()?;
        Some(Arch {
            major: number / 10,
            minor: number % 10,
            specific,
        })
    }

    /// Machine code runs on its own capability and, unless it is specific to that, on higher minors
    /// of the same major.
    fn runs_on(self, (major, minor): (u32, u32)) -> bool {
        self.major == major && (self.minor == minor || !self.specific && self.minor < minor)
    }
}

/// Whether a target's name is that of a CUDA architecture.
pub fn is_cuda_target(name: &str) -> bool {
    Arch::parse(name).is_some()
}

/// The target made for what is closest to a compute capability, of those that run on it.
pub fn best_target(targets: &[Target], capability: (u32, u32)) -> Option<&Target> {
    let names = targets.iter().map(|target| target.name.as_str());
    best(names, capability).map(|index| &targets[index])
}

/// The `--target` to compile with for a compute capability; none where kilnc has none.
pub fn target_to_compile(capability: (u32, u32)) -> Option<&'static str> {
    best(KNOWN, capability).map(|index| KNOWN[index])
}

fn best<'a>(names: impl IntoIterator<Item = &'a str>, capability: (u32, u32)) -> Option<usize> {
    names
        .into_iter()
        .enumerate()
        .filter_map(|(index, name)| Some((index, Arch::parse(name)?)))
        .filter(|(_, arch)| arch.runs_on(capability))
        .max_by_key(|(_, arch)| (arch.minor, arch.specific))
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed() {
        let arch = |major, minor, specific| {
            Some(Arch {
                major,
                minor,
                specific,
            })
        };
        assert_eq!(Arch::parse("sm_80"), arch(8, 0, false));
        assert_eq!(Arch::parse("sm_90a"), arch(9, 0, true));
        assert_eq!(Arch::parse("sm_120a"), arch(12, 0, true));
        for name in [
            "cpu",
            "sm_",
            "sm_a",
            "sm_8",
            "sm_9x",
            "sm_+80",
            "compute_80",
            "",
        ] {
            assert_eq!(Arch::parse(name), None, "{name}");
        }
    }

    #[test]
    fn the_closest_that_runs_is_taken() {
        let check = |names: &[&str], capability, expect: Option<&str>| {
            let found = best(names.iter().copied(), capability).map(|index| names[index]);
            assert_eq!(found, expect, "{names:?} on {capability:?}");
        };
        let all = [
            "cpu", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a",
        ];
        check(&all, (8, 0), Some("sm_80"));
        check(&all, (8, 6), Some("sm_86"));
        check(&all, (8, 7), Some("sm_86"));
        check(&all, (8, 9), Some("sm_89"));
        check(&all, (9, 0), Some("sm_90a"));
        check(&all, (10, 0), Some("sm_100a"));
        check(&all, (12, 0), Some("sm_120a"));
        // Specific code runs on nothing else, and none runs on another major.
        check(&all, (10, 3), None);
        check(&all, (12, 1), None);
        check(&all, (7, 5), None);
        check(&["sm_86"], (8, 9), Some("sm_86"));
        check(&["sm_89"], (8, 6), None);
        check(&["sm_80"], (9, 0), None);
        check(&["sm_90", "sm_90a"], (9, 0), Some("sm_90a"));
        check(&["cpu"], (9, 0), None);
    }

    #[test]
    fn advice_names_what_would_run() {
        assert_eq!(target_to_compile((8, 7)), Some("sm_86"));
        assert_eq!(target_to_compile((9, 0)), Some("sm_90a"));
        assert_eq!(target_to_compile((7, 5)), None);
    }
}
