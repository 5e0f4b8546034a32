//! `kiln-perf report`: a page of tables.

use super::print;
use crate::report::{Sources, html, markdown, sources};
use crate::table::Table;
use anyhow::{Context, ensure};
use kiln_bundle::WholeFile;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

/// Most bytes of a kernel's source.
const MAX_SOURCE_BYTES: u64 = 1 << 20;

/// Arguments of `kiln-perf report`.
#[derive(clap::Args)]
pub(super) struct ReportArgs {
    /// Tables of `kiln-perf table`
    #[arg(required = true, value_name = "TABLE")]
    tables: Vec<PathBuf>,
    /// File of the page
    #[arg(short, long, value_name = "FILE", required_unless_present = "markdown")]
    output: Option<PathBuf>,
    /// Bundle that a table is of: the page shows the sources of its CUDA kernels; may be repeated
    #[arg(long, value_name = "BUNDLE")]
    bundle: Vec<PathBuf>,
    /// Prints Markdown, for the summary of a pull request
    #[arg(long)]
    markdown: bool,
}

pub(super) fn run(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    let tables: Result<Vec<Table>, _> = args.tables.iter().map(|path| Table::read(path)).collect();
    let tables = tables?;
    let steps = tables.iter().flat_map(|table| &table.models);
    ensure!(
        steps.map(|model| model.steps.len()).sum::<usize>() > 0,
        "the tables have no step; make them with `kiln-perf table`"
    );
    if let Some(output) = &args.output {
        let page = html(&tables, &read_sources(&tables, &args.bundle)?)?;
        WholeFile::create(output)?.finish(|to| to.write_all(page.as_bytes()))?;
        eprintln!("wrote {}", output.display());
    }
    if args.markdown {
        print(&markdown(&tables))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The sources that tables mention, from the first bundle that has them.
fn read_sources(tables: &[Table], bundles: &[PathBuf]) -> anyhow::Result<Sources> {
    let mut found = Sources::new();
    for name in sources(tables) {
        let inside = Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        ensure!(
            inside,
            "a table has the source {name:?}, which is no path in a bundle"
        );
        let files = bundles.iter().map(|bundle| bundle.join(name));
        let Some(file) = files.into_iter().find(|file| file.is_file()) else {
            continue;
        };
        let context = || format!("cannot read {}", file.display());
        let size = fs::metadata(&file).with_context(context)?.len();
        ensure!(
            size <= MAX_SOURCE_BYTES,
            "{} has {size} bytes; a source has {MAX_SOURCE_BYTES} at most",
            file.display()
        );
        found.insert(
            name.to_owned(),
            fs::read_to_string(&file).with_context(context)?,
        );
    }
    Ok(found)
}
