//! A page of tables: where the time of a step goes, what is left to the limits of the machine, and how
//! steps grow with length and batch.
//!
//! The page is one file with all that it needs (`benches/templates/report.html`). What stands in it as
//! text is made here, so that the template has markup alone.

mod plot;

use crate::table::{ModelTable, Row, Source, StepTable, Table};
use askama::Template;
use kiln_bundle::Phase;
use plot::{Axis, Fit, Plot, Scale};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// Colours that the page has for kernels.
const COLOURS: usize = 10;
/// Share of a bar, in per cent, that has room for its own figure.
const LABEL_PERCENT: f64 = 9.0;

/// Sources of kernels, by the name that a table has for them.
pub type Sources = BTreeMap<String, String>;

/// A page of tables, in which kernels lead to those sources that there are.
///
/// # Errors
/// A failure of the template.
pub fn html(tables: &[Table], sources: &Sources) -> Result<String, askama::Error> {
    let models = tables
        .iter()
        .flat_map(|table| table.models.iter().map(move |model| (table, model)));
    let sections: Vec<Section> = (0..)
        .zip(models)
        .map(|(index, (table, model))| section(index, table, model, sources))
        .collect();
    let sources = (0..).zip(sources).map(|(index, (name, text))| Listing {
        id: source_id(index),
        name,
        text,
    });
    let sources = sources.collect();
    Page { sections, sources }.render()
}

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    sections: Vec<Section>,
    sources: Vec<Listing<'a>>,
}

/// A bundle on a target.
struct Section {
    id: String,
    title: String,
    predicted: bool,
    /// What it is of, by name.
    facts: Vec<(&'static str, String)>,
    cards: Vec<Card>,
    /// Kernels by colour, where marks have no other name.
    legend: Vec<(usize, String)>,
    figures: Vec<Figure>,
    steps: Vec<Step>,
}

/// A step as a bar, and its kernels as bars to their limit.
struct Card {
    executable: String,
    size: String,
    time: String,
    facts: String,
    /// Of kernels and remainder; they sum to 100.
    parts: Vec<Part>,
    bars: Vec<Bar>,
    remainder: String,
}

/// Of a bar, in per cent of its whole.
struct Part {
    x: f64,
    width: f64,
    /// None: the remainder.
    colour: Option<usize>,
    label: String,
    title: String,
    href: String,
}

impl Part {
    fn middle(&self) -> f64 {
        self.x + self.width / 2.0
    }
}

/// A kernel's share of its limit.
struct Bar {
    colour: usize,
    name: String,
    href: String,
    time: String,
    percent: String,
    /// Per cent, 100 at most.
    width: f64,
    limit: &'static str,
}

/// A plot with what is to be read from it.
struct Figure {
    title: String,
    plot: Plot,
    /// Class of a line and what it stands for.
    lines: Vec<(&'static str, String)>,
    text: String,
}

/// A step's part of the table.
struct Step {
    title: String,
    rows: Vec<RowText>,
    total: RowText,
}

struct RowText {
    id: String,
    kernel: String,
    spec: String,
    cells: Vec<String>,
    references: Vec<String>,
    /// One for each launch.
    resources: Vec<Resources>,
}

struct Resources {
    source: String,
    /// Of the listing, where there is one.
    href: Option<String>,
    text: String,
}

/// A kernel's source.
struct Listing<'a> {
    id: String,
    name: &'a str,
    text: &'a str,
}

fn source_id(index: usize) -> String {
    format!("source-{index}")
}

fn row_id(section: usize, step: usize, row: usize) -> String {
    format!("row-{section}-{step}-{row}")
}

fn section(index: usize, table: &Table, model: &ModelTable, sources: &Sources) -> Section {
    let machine = &table.machine;
    let ceilings = &machine.ceilings;
    let mut facts = vec![
        ("device", machine.device.clone()),
        (
            // A GPU's bandwidth is measured by copying.
            match machine.datasheet {
                Some(_) => "copies",
                None => "reads",
            },
            format!("{:.1} GB/s", ceilings.read_gb_per_s),
        ),
        (
            "float",
            match &machine.datasheet {
                Some(gpu) => format!("{} (datasheet of {gpu})", rate(ceilings.float_gflop_per_s)),
                None => rate(ceilings.float_gflop_per_s),
            },
        ),
    ];
    // The first is that of floating-point numbers.
    facts.extend((ceilings.peaks().skip(1)).map(|(name, peak)| (name, rate(peak))));
    facts.push(("KV cache", model.dtype.to_string()));
    facts.push((
        "kiln",
        match &table.commit {
            Some(commit) => format!("{} ({commit})", table.kiln_version),
            None => table.kiln_version.clone(),
        },
    ));
    facts.push(("made", table.made.clone()));
    let colours = Colours::of(model);
    let shown = longest(&model.steps);
    let mut figures = vec![roofline(index, table, model, &shown, &colours)];
    figures.extend(length_scaling(index, model));
    figures.extend(batch_scaling(model));
    Section {
        id: format!("model-{index}"),
        title: title(model),
        predicted: model.source == Source::Predicted,
        facts,
        cards: shown
            .iter()
            .map(|&step| card(index, step, table, &model.steps[step], &colours))
            .collect(),
        legend: colours.legend(),
        figures,
        steps: (0..)
            .zip(&model.steps)
            .map(|(number, step)| step_text(index, number, step, sources))
            .collect(),
    }
}

fn title(model: &ModelTable) -> String {
    let activations = model.activations.map_or(String::new(), |activations| {
        format!(", {} activations", activations.name())
    });
    format!(
        "{}, {} weights{activations}, {}",
        model.model, model.weights, model.target
    )
}

/// Of those steps that differ in their length alone, the longest.
fn longest(steps: &[StepTable]) -> Vec<usize> {
    let same = |a: &StepTable, b: &StepTable| {
        (&a.executable, a.sequences, a.tokens) == (&b.executable, b.sequences, b.tokens)
    };
    (0..steps.len())
        .filter(|&index| {
            let step = &steps[index];
            let longer = |other: &StepTable| same(step, other) && other.kv_len > step.kv_len;
            !steps.iter().any(longer)
        })
        .collect()
}

/// Kernels of a model are of one colour in all of its steps.
struct Colours<'a>(Vec<&'a str>);

impl<'a> Colours<'a> {
    fn of(model: &'a ModelTable) -> Colours<'a> {
        let mut specs = Vec::new();
        for row in model.steps.iter().flat_map(|step| &step.rows) {
            if !specs.contains(&row.spec.as_str()) {
                specs.push(&row.spec);
            }
        }
        Colours(specs)
    }

    fn get(&self, row: &Row) -> usize {
        let found = self.0.iter().position(|&spec| spec == row.spec);
        found.unwrap_or(0) % COLOURS
    }

    fn legend(&self) -> Vec<(usize, String)> {
        let specs = self.0.iter().enumerate();
        specs
            .map(|(index, &spec)| (index % COLOURS, words(spec)))
            .collect()
    }
}

fn card(
    section: usize,
    number: usize,
    table: &Table,
    step: &StepTable,
    colours: &Colours<'_>,
) -> Card {
    let median_us = step.time.median_us;
    // Kernels that overlap leave nothing for the remainder.
    let remainder_us = step.remainder_us.max(0.0);
    // Not of all zeros.
    let whole_us = (step.kernels_us() + remainder_us).max(1e-9);
    let mut x = 0.0;
    let mut part = |us: f64, colour: Option<usize>, name: &str, href: String| {
        let width = 100.0 * us / whole_us;
        x += width;
        Part {
            x: x - width,
            width,
            colour,
            label: if width < LABEL_PERCENT {
                String::new()
            } else {
                format!("{width:.0}%")
            },
            title: format!("{name}: {} ({width:.1}%)", time(us)),
            href,
        }
    };
    let mut parts: Vec<Part> = step
        .rows
        .iter()
        .enumerate()
        .map(|(index, row)| {
            let href = row_id(section, number, index);
            part(
                row.total_us(),
                Some(colours.get(row)),
                &words(&row.spec),
                href,
            )
        })
        .collect();
    let href = row_id(section, number, step.rows.len());
    parts.push(part(remainder_us, None, "remainder", href));
    let remainder = format!(
        "{} ({:.1}%){}",
        time(step.remainder_us),
        100.0 * step.remainder_us / median_us,
        match step.remainder_us < 0.0 {
            true => ", kernels overlap",
            false => "",
        }
    );
    let bars = step.rows.iter().enumerate().map(|(index, row)| {
        let percent = 100.0 * row.share_of_limit();
        Bar {
            colour: colours.get(row),
            name: words(&row.spec),
            href: row_id(section, number, index),
            time: match row.count {
                1 => time(row.total_us()),
                count => format!("{count} × {}", time(row.time.median_us)),
            },
            percent: amount(percent, 0, "%"),
            width: if percent.is_finite() {
                percent.min(100.0)
            } else {
                0.0
            },
            limit: limit(table, row),
        }
    });
    Card {
        executable: step.executable.clone(),
        size: step.size(),
        time: time(median_us),
        facts: format!(
            "{} tokens/s, floor {}, {:.0}% of the limit; kernels and remainder sum to {:.1}%",
            count(1e6 * step.tokens as f64 / median_us),
            time(step.floor_us),
            100.0 * step.floor_us / median_us,
            100.0 * step.explained()
        ),
        bars: bars.collect(),
        parts,
        remainder,
    }
}

/// Which ceiling a kernel's floor lies at.
fn limit(table: &Table, row: &Row) -> &'static str {
    let bytes_us = row.bytes / table.machine.ceilings.read_gb_per_s / 1e3;
    match row.floor_us > 1.01 * bytes_us {
        true => "peak",
        false => "bandwidth",
    }
}

fn roofline(
    section: usize,
    table: &Table,
    model: &ModelTable,
    shown: &[usize],
    colours: &Colours<'_>,
) -> Figure {
    let ceilings = &table.machine.ceilings;
    let peaks: Vec<(&'static str, f64)> = ceilings.peaks().collect();
    let highest = peaks.iter().map(|peak| peak.1).fold(0.0, f64::max);
    let ridge = highest / ceilings.read_gb_per_s;
    // Of each shown step by its number.
    let mut rows: Vec<(usize, usize, &Row)> = Vec::new();
    for &number in shown {
        let step = (0..).zip(&model.steps[number].rows);
        rows.extend(step.map(|(index, row)| (number, index, row)));
    }
    rows.retain(|(_, _, row)| row.bytes > 0.0 && row.flops > 0.0 && row.time.median_us > 0.0);
    let intensities = rows.iter().map(|(_, _, row)| row.flops / row.bytes);
    let x = Axis::horizontal(Scale::Log, intensities.chain([ridge * 3.0, ridge / 30.0]));
    let rates = rows.iter().map(|(_, _, row)| row.gflop_per_s());
    let y = Axis::vertical(Scale::Log, rates.chain([highest * 1.3, highest / 100.0]));
    let mut plot = Plot::new("Roofline", ("operations for each byte", x), ("GFLOP/s", y));
    let bandwidth = |intensity: f64| intensity * ceilings.read_gb_per_s;
    // Both axes clip to their ends, which would bend the line.
    let start = x.low().max(y.low() / ceilings.read_gb_per_s);
    plot.line("float", [(start, bandwidth(start)), (ridge, highest)]);
    for &(name, peak) in &peaks {
        let ridge = peak / ceilings.read_gb_per_s;
        plot.line(name, [(ridge, peak), (x.high(), peak)]);
    }
    for (number, index, row) in rows {
        let step = &model.steps[number];
        plot.mark(
            (row.flops / row.bytes, row.gflop_per_s()),
            format!("k{}", colours.get(row)),
            step.phase == Phase::Prefill,
            format!(
                "{}, {}: {}, {:.1} GB/s",
                words(&row.spec),
                step.executable,
                rate(row.gflop_per_s()),
                row.gb_per_s()
            ),
            row_id(section, number, index),
        );
    }
    let mut lines = vec![
        ("circle", "decode".to_owned()),
        ("square", "prefill".to_owned()),
    ];
    lines.extend(peaks.iter().map(|&(name, peak)| {
        let reads = ceilings.read_gb_per_s;
        (name, format!("{reads:.1} GB/s, {name} {}", rate(peak)))
    }));
    Figure {
        title: "Roofline".to_owned(),
        plot,
        lines,
        text: "Each mark is a kernel of a step above. What lies on a line uses all that the machine has \
               of it; above it, data came from caches."
            .to_owned(),
    }
}

/// Decode attention of each executable that was timed at several lengths.
fn length_scaling(section: usize, model: &ModelTable) -> Vec<Figure> {
    let mut groups: BTreeMap<(&str, usize), Vec<usize>> = BTreeMap::new();
    for (index, step) in model.steps.iter().enumerate() {
        if step.phase == Phase::Decode {
            let key = (step.executable.as_str(), step.sequences);
            groups.entry(key).or_default().push(index);
        }
    }
    let figure = |((executable, sequences), steps): ((&str, usize), Vec<usize>)| {
        let mut points: Vec<(usize, usize, f64, f64)> = Vec::new();
        for &number in &steps {
            let step = &model.steps[number];
            let is_attention = |row: &&Row| row.kernel == "attention";
            let us = step
                .rows
                .iter()
                .filter(is_attention)
                .map(Row::total_us)
                .sum();
            if let Some(index) = step.rows.iter().position(|row| is_attention(&row)) {
                points.push((number, index, step.kv_len as f64, us));
            }
        }
        points.sort_by(|a, b| a.2.total_cmp(&b.2));
        let places: Vec<(f64, f64)> = points.iter().map(|point| (point.2, point.3)).collect();
        let fit = Fit::of(&places)?;
        let (shortest, longest) = (places.first()?, places.last()?);
        if shortest.1 <= 0.0 {
            return None;
        }
        let bound = bucket_bound(executable).unwrap_or(0.0).max(longest.0);
        let whole = fit.at(bound);
        let x = Axis::horizontal(Scale::Linear, [bound]);
        let y = places.iter().map(|place| place.1).chain([whole]);
        let y = Axis::vertical(Scale::Linear, y.map(milliseconds));
        let name = "Decode attention by length";
        let mut plot = Plot::new(name, ("KV length, positions", x), ("ms a step", y));
        plot.line("fit", [0.0, bound].map(|x| (x, milliseconds(fit.at(x)))));
        plot.line("simulated", [0.0, bound].map(|x| (x, milliseconds(whole))));
        for (number, index, kv_len, us) in points {
            let title = format!("KV {kv_len}: {}", time(us));
            let href = row_id(section, number, index);
            plot.mark(
                (kv_len, milliseconds(us)),
                "k0".to_owned(),
                false,
                title,
                href,
            );
        }
        Some(Figure {
            title: format!("{name}: {executable}, B {sequences}"),
            plot,
            lines: vec![
                ("circle", "timed, all layers".to_owned()),
                ("fit", "least squares".to_owned()),
                (
                    "simulated",
                    format!("simulated: reads all {bound} positions of the bucket"),
                ),
            ],
            text: format!(
                "Slope {} a position, intercept {}, R² {:.4}. A design that reads the whole \
                 bucket, simulated from the line, takes {} at every length: {:.1} times as long at {} \
                 positions.",
                time(fit.slope),
                time(fit.intercept),
                fit.r_squared,
                time(whole),
                whole / shortest.1,
                shortest.0
            ),
        })
    };
    groups.into_iter().filter_map(figure).collect()
}

/// The KV length in the name of a decode executable: `decode-b1-kv256`.
fn bucket_bound(executable: &str) -> Option<f64> {
    let (_, bound) = executable.rsplit_once("-kv")?;
    bound.parse::<u32>().ok().map(f64::from)
}

/// Decode steps of several batches, at the length that has the most of them.
fn batch_scaling(model: &ModelTable) -> Option<Figure> {
    let decode = |step: &&StepTable| step.phase == Phase::Decode;
    let mut lengths: BTreeMap<usize, BTreeMap<usize, f64>> = BTreeMap::new();
    for step in model.steps.iter().filter(decode) {
        let batches = lengths.entry(step.kv_len).or_default();
        batches.entry(step.sequences).or_insert(step.time.median_us);
    }
    let (kv_len, batches) = lengths
        .into_iter()
        .max_by_key(|(_, batches)| batches.len())?;
    let (&first, &first_us) = batches.first_key_value()?;
    if batches.len() < 2 {
        return None;
    }
    let alone = |batch: usize| milliseconds(first_us * batch as f64 / first as f64);
    let places = batches
        .iter()
        .map(|(&batch, &us)| (batch as f64, milliseconds(us)));
    let largest = batches.keys().copied().max().unwrap_or(first);
    let x = Axis::horizontal(Scale::Linear, [largest as f64]);
    let y = places.clone().map(|place| place.1).chain([alone(largest)]);
    let y = Axis::vertical(Scale::Linear, y);
    let mut plot = Plot::new("Decode by batch", ("B, sequences", x), ("ms a step", y));
    plot.set_x_ticks(batches.keys().map(|&batch| batch as f64));
    let line = [first, largest].map(|batch| (batch as f64, alone(batch)));
    plot.line("simulated", line);
    plot.line("fit", places.clone());
    for (batch, ms) in places {
        let title = format!("B {batch}: {ms:.3} ms");
        plot.mark((batch, ms), "k0".to_owned(), false, title, String::new());
    }
    let rates = batches
        .iter()
        .map(|(&batch, &us)| format!("{} tokens/s at B {batch}", count(1e6 * batch as f64 / us)));
    Some(Figure {
        title: format!("Decode by batch: KV {kv_len}"),
        plot,
        lines: vec![
            ("circle", "step".to_owned()),
            (
                "simulated",
                format!("simulated: as many steps of B {first}"),
            ),
        ],
        text: format!("{}.", rates.collect::<Vec<_>>().join(", ")),
    })
}

/// Names of the cells of a row.
const CELLS: [&str; 9] = [
    "median",
    "min to p95",
    "bytes",
    "operations",
    "GB/s",
    "GFLOP/s",
    "floor",
    "of limit",
    "of step",
];

impl Page<'_> {
    fn cells(&self) -> [&'static str; 9] {
        CELLS
    }
}

fn step_text(section: usize, number: usize, step: &StepTable, sources: &Sources) -> Step {
    let rows = step.rows.iter().enumerate().map(|(index, row)| RowText {
        id: row_id(section, number, index),
        kernel: words(&row.spec),
        spec: format!("{} × {}, {}", row.count, row.shapes, row.format),
        cells: vec![
            time(row.time.median_us),
            format!("{} to {}", time(row.time.min_us), time(row.time.p95_us)),
            bytes(row.bytes),
            count(row.flops),
            amount(row.gb_per_s(), 1, ""),
            amount(row.gflop_per_s(), 1, ""),
            time(row.floor_us),
            amount(100.0 * row.share_of_limit(), 0, "%"),
            amount(100.0 * row.share_of_step, 1, "%"),
        ],
        references: row
            .references
            .iter()
            .map(|reference| {
                let ratio = amount(reference.time.median_us / row.time.median_us, 2, "");
                let (name, format) = (&reference.name, &reference.format);
                let us = time(reference.time.median_us);
                format!("{name} ({format}): {us}, {ratio} of kiln's time")
            })
            .collect(),
        resources: row
            .launches()
            .map(|resources| Resources {
                source: resources.source.clone(),
                href: sources
                    .keys()
                    .position(|name| *name == resources.source)
                    .map(source_id),
                text: resources_text(resources),
            })
            .collect(),
    });
    let kernels_us = step.kernels_us();
    let share = |us: f64| amount(100.0 * us / step.time.median_us, 1, "%");
    Step {
        title: format!(
            "{} ({}): {}",
            step.executable,
            step.size(),
            time(step.time.median_us)
        ),
        rows: rows.collect(),
        total: RowText {
            id: row_id(section, number, step.rows.len()),
            kernel: "whole step".to_owned(),
            spec: format!(
                "kernels {} ({}), remainder {} ({})",
                time(kernels_us),
                share(kernels_us),
                time(step.remainder_us),
                share(step.remainder_us)
            ),
            cells: vec![
                time(step.time.median_us),
                format!("{} to {}", time(step.time.min_us), time(step.time.p95_us)),
                bytes(
                    step.rows
                        .iter()
                        .map(|row| row.count as f64 * row.bytes)
                        .sum(),
                ),
                count(
                    step.rows
                        .iter()
                        .map(|row| row.count as f64 * row.flops)
                        .sum(),
                ),
                String::new(),
                String::new(),
                time(step.floor_us),
                amount(100.0 * step.floor_us / step.time.median_us, 0, "%"),
                "100%".to_owned(),
            ],
            references: vec![],
            resources: vec![],
        },
    }
}

fn resources_text(resources: &crate::table::KernelResources) -> String {
    let [grid, block] = [resources.grid, resources.block].map(|[x, y, z]| format!("{x}×{y}×{z}"));
    let mut text = format!(
        "{} registers, {} shared, {} spilled, grid {grid}, block {block}, {} blocks a multiprocessor, \
         occupancy {:.0}%",
        resources.registers,
        bytes(f64::from(resources.smem_bytes)),
        bytes(f64::from(resources.spill_bytes)),
        resources.blocks_per_multiprocessor,
        100.0 * resources.occupancy
    );
    for (name, number) in &resources.instructions {
        let _ = write!(text, ", {name} {number}");
    }
    text
}

/// Tables for the summary of a pull request: the steps of each model, and the kernels of those that
/// differ in more than their length.
pub fn markdown(tables: &[Table]) -> String {
    let mut text = String::new();
    let models = tables
        .iter()
        .flat_map(|table| table.models.iter().map(move |model| (table, model)));
    for (table, model) in models {
        let predicted = match model.source {
            Source::Measured => "",
            Source::Predicted => ", predicted",
        };
        let heading = format!("{}{predicted}: {}", title(model), table.machine.device);
        let _ = write!(
            text,
            "## {}\n\n| step | time | floor | of limit | remainder |\n|---|--:|--:|--:|--:|\n",
            markdown_text(&heading)
        );
        for step in &model.steps {
            let _ = writeln!(
                text,
                "| {} ({}) | {} | {} | {:.0}% | {} |",
                markdown_text(&step.executable),
                step.size(),
                time(step.time.median_us),
                time(step.floor_us),
                100.0 * step.floor_us / step.time.median_us,
                time(step.remainder_us)
            );
        }
        for step in longest(&model.steps).into_iter().map(|i| &model.steps[i]) {
            let _ = write!(
                text,
                "\n{} ({}):\n\n| kernel | count | time | GB/s | GFLOP/s | of limit | of step |\n\
                 |---|--:|--:|--:|--:|--:|--:|\n",
                markdown_text(&step.executable),
                step.size()
            );
            for row in &step.rows {
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {} | {} | {} | {:.1}% |",
                    markdown_text(&row.spec),
                    row.count,
                    time(row.time.median_us),
                    amount(row.gb_per_s(), 1, ""),
                    amount(row.gflop_per_s(), 1, ""),
                    amount(100.0 * row.share_of_limit(), 0, "%"),
                    100.0 * row.share_of_step
                );
            }
        }
        for figure in length_scaling(0, model) {
            let _ = writeln!(text, "\n{}: {}", markdown_text(&figure.title), figure.text);
        }
        text.push('\n');
    }
    text
}

/// Text as it stands in a cell of Markdown: nothing in it is markup.
pub fn markdown_text(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\\' | '|' | '*' | '_' | '`' | '[' | ']' | '<' | '>' | '#' | '~' => {
                escaped.extend(['\\', c]);
            }
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

fn milliseconds(us: f64) -> f64 {
    us / 1e3
}

/// A spec with its arrows drawn, which lines do not break at.
fn words(spec: &str) -> String {
    spec.replace(" -> ", "\u{a0}→\u{a0}")
}

/// Three places, with the unit that suits.
fn time(us: f64) -> String {
    let (value, unit) = match us.abs() {
        size if size >= 1e6 => (us / 1e6, "s"),
        size if size >= 1e3 => (us / 1e3, "ms"),
        size if size > 0.0 && size < 0.1 => (us * 1e3, "ns"),
        _ => (us, "µs"),
    };
    let places = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.places$} {unit}")
}

fn bytes(bytes: f64) -> String {
    match bytes {
        size if size >= 1e9 => format!("{:.2} GB", size / 1e9),
        size if size >= 1e6 => format!("{:.2} MB", size / 1e6),
        size if size >= 1e3 => format!("{:.1} kB", size / 1e3),
        size => format!("{size:.0} B"),
    }
}

fn count(number: f64) -> String {
    match number {
        size if size >= 1e9 => format!("{:.2} G", size / 1e9),
        size if size >= 1e6 => format!("{:.2} M", size / 1e6),
        size if size >= 1e4 => format!("{:.1} k", size / 1e3),
        size => format!("{size:.0}"),
    }
}

fn rate(gflop_per_s: f64) -> String {
    match gflop_per_s {
        size if size >= 1e4 => format!("{:.0} TFLOP/s", size / 1e3),
        size if size >= 1e3 => format!("{:.2} TFLOP/s", size / 1e3),
        size => format!("{size:.0} GFLOP/s"),
    }
}

/// A figure, or a dash where there is none: a rate of what takes no time.
fn amount(value: f64, places: usize, unit: &str) -> String {
    match value.is_finite() {
        true => format!("{value:.places$}{unit}"),
        false => "-".to_owned(),
    }
}

/// Names of the sources that tables mention.
pub fn sources(tables: &[Table]) -> BTreeSet<&str> {
    let models = tables.iter().flat_map(|table| &table.models);
    let rows = models
        .flat_map(|model| &model.steps)
        .flat_map(|step| &step.rows);
    rows.flat_map(Row::launches)
        .map(|resources| resources.source.as_str())
        .collect()
}
