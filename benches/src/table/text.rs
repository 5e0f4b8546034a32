//! A table as text.

use crate::table::{Ceilings, KernelResources, ModelTable, Row, Source, StepTable, Table};
use comfy_table::{CellAlignment, Table as Text, presets};
use std::fmt::{Display, Write};

/// Instructions that are shown: products of tensor cores, and what reaches memory.
const SHOWN_OPCODES: [&str; 9] = [
    "HMMA", "LDG", "LDGSTS", "LDS", "LDL", "STG", "STS", "STL", "ATOMG",
];

/// Columns that are no figures: kernel, shapes, format.
const TEXTS: usize = 3;

/// All of a table.
pub fn text(table: &Table) -> String {
    let mut text = String::new();
    let machine = &table.machine;
    let Ceilings {
        read_gb_per_s,
        float_gflop_per_s,
        integer_gop_per_s,
        bf16_pieces_gflop_per_s,
        bf16_gflop_per_s,
        int8_gop_per_s,
    } = machine.ceilings;
    let measured = |model: &ModelTable| model.source == Source::Measured;
    let source = match table.models.iter().any(measured) {
        true => "measured in this run",
        false => "of the datasheet",
    };
    let _ = write!(text, "{}: {read_gb_per_s:.1} GB/s", machine.device);
    if let Some(gpu) = &machine.datasheet {
        let _ = writeln!(
            text,
            " of copying, {source}; {float_gflop_per_s:.0} GFLOP/s of the datasheet of {gpu}"
        );
    } else {
        let _ = write!(text, ", {float_gflop_per_s:.0} GFLOP/s");
        for (rate, what) in [
            (bf16_pieces_gflop_per_s, "GFLOP/s of bf16 in pieces"),
            (bf16_gflop_per_s, "GFLOP/s of bf16"),
            (integer_gop_per_s, "GOP/s of integers"),
            (int8_gop_per_s, "GOP/s of 8 bits"),
        ] {
            if let Some(rate) = rate {
                let _ = write!(text, ", {rate:.0} {what}");
            }
        }
        let _ = writeln!(text, "; {source}");
    }
    for model in &table.models {
        for step in &model.steps {
            let _ = writeln!(text, "\n{}", step_text(model, step));
        }
    }
    if table.models.iter().any(measured) {
        text += "\nlimit: the time that bytes or operations need at the rates above, over the time taken. \
                 What a cache holds can be faster.\n";
    }
    if table.models.iter().any(ModelTable::is_timed_apart) {
        text += "kernels of a GPU: timed by events between the launches of a graph, one after another, each with \
                 its launches. The step was timed without events; where its kernels overlap, the remainder is \
                 that much less, and may be negative.\n";
    }
    text
}

fn step_text(model: &ModelTable, step: &StepTable) -> String {
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    let mut text = format!(
        "{} {} ({}), {}: {} sequence{}, {} new token{}, {} positions each\n",
        model.model,
        model.formats(),
        model.target,
        step.executable,
        step.sequences,
        plural(step.sequences),
        step.tokens,
        plural(step.tokens),
        step.kv_len
    );
    text += &match model.source {
        Source::Measured => measured(step, model.is_timed_apart()),
        Source::Predicted => {
            "PREDICTED from bytes, operations and a datasheet; nothing was measured\n".to_owned()
                + &predicted(step)
        }
    };
    text
}

fn measured(step: &StepTable, apart: bool) -> String {
    let mut references: Vec<(String, String)> = Vec::new();
    for reference in step.rows.iter().flat_map(|row| &row.references) {
        let key = (reference.name.clone(), reference.format.clone());
        if !references.contains(&key) {
            references.push(key);
        }
    }
    let mut table = figures(
        &[
            "kernel",
            "shapes",
            "format",
            "count",
            "MB",
            "MFLOP",
            "median us",
            "min",
            "p95",
            "GB/s",
            "GFLOP/s",
            "limit",
            "step",
        ]
        .map(str::to_owned)
        .into_iter()
        .chain(
            references
                .iter()
                .map(|(name, format)| format!("{name} {format}")),
        )
        .collect::<Vec<_>>(),
        TEXTS,
    );
    for row in &step.rows {
        let mut cells = common(row);
        cells.extend([
            format!("{:.1}", row.time.median_us),
            format!("{:.1}", row.time.min_us),
            format!("{:.1}", row.time.p95_us),
            format!("{:.1}", row.gb_per_s()),
            format!("{:.1}", row.gflop_per_s()),
            percent(row.share_of_limit()),
            percent(row.share_of_step),
        ]);
        for (name, format) in &references {
            let mut all = row.references.iter();
            let found = all.find(|found| (&found.name, &found.format) == (name, format));
            cells.push(found.map_or(String::new(), |found| {
                format!("{:.2}x", found.time.median_us / row.time.median_us)
            }));
        }
        table.add_row(cells);
    }
    let kernels_us = step.kernels_us();
    table.add_row(total(
        step,
        [
            format!("{kernels_us:.1}"),
            String::new(),
            String::new(),
            format!("{:.1}", sum(step, |row| row.bytes) / kernels_us / 1e3),
            format!("{:.1}", sum(step, |row| row.flops) / kernels_us / 1e3),
            percent(step.floor_us / kernels_us),
            percent(kernels_us / step.time.median_us),
        ],
    ));
    let remainder = format!(
        "remainder {:.1} ({})",
        step.remainder_us,
        percent(step.remainder_us / step.time.median_us)
    );
    let sum = match apart {
        true => format!("kernels one after another {kernels_us:.1}, {remainder}"),
        false => format!(
            "kernels {kernels_us:.1} + {remainder} explain {} of it",
            percent(step.explained())
        ),
    };
    let mut text = format!(
        "{}\nstep {:.1} us (min {:.1}, p95 {:.1}); {sum}; sum of floors {:.1} us ({} of the step)\n",
        table.trim_fmt(),
        step.time.median_us,
        step.time.min_us,
        step.time.p95_us,
        step.floor_us,
        percent(step.floor_us / step.time.median_us),
    );
    if !references.is_empty() {
        text += "references: their time over this one's; above 1, kiln is faster. They compute the product alone, \
                 without norm, bias, activation and residual\n";
    }
    text
}

fn predicted(step: &StepTable) -> String {
    let mut table = figures(
        &[
            "kernel",
            "shapes",
            "format",
            "count",
            "MB",
            "MFLOP",
            "predicted us",
            "floor us",
            "step",
            "grid",
            "threads",
            "registers",
            "shared KiB",
            "spill B",
            "blocks/SM",
            "occupancy",
            "instructions",
        ],
        TEXTS,
    );
    for row in &step.rows {
        let mut cells = common(row);
        cells.extend([
            format!("{:.2}", row.time.median_us),
            format!("{:.2}", row.floor_us),
            percent(row.share_of_step),
        ]);
        cells.extend(row.resources.iter().flat_map(resources));
        table.add_row(cells);
        for launch in &row.prepared_by {
            let source = launch.source.rsplit('/').next().unwrap_or_default();
            let mut cells = vec![format!("  after {}", source.trim_end_matches(".cu"))];
            cells.extend(std::iter::repeat_n(String::new(), 8));
            cells.extend(resources(launch));
            table.add_row(cells);
        }
    }
    table.add_row(total(
        step,
        [
            format!("{:.2}", step.time.median_us),
            format!("{:.2}", step.floor_us),
            percent(1.0),
        ],
    ));
    format!("{}\n", table.trim_fmt())
}

fn resources(launch: &KernelResources) -> [String; 8] {
    let by = |[x, y, z]: [u32; 3]| match z {
        1 => format!("{x}x{y}"),
        _ => format!("{x}x{y}x{z}"),
    };
    let shown = launch.instructions.iter();
    let shown = shown.filter(|(kind, _)| {
        let operation = kind.split('.').next().unwrap_or_default();
        SHOWN_OPCODES.contains(&operation)
    });
    let instructions: Vec<String> = shown
        .map(|(kind, count)| format!("{kind} {count}"))
        .chain(match launch.instructions.is_empty() {
            true => None,
            false => Some(format!(
                "all {}",
                launch
                    .instructions
                    .iter()
                    .map(|(_, count)| u64::from(*count))
                    .sum::<u64>()
            )),
        })
        .collect();
    [
        by(launch.grid),
        launch.block[0].to_string(),
        launch.registers.to_string(),
        format!("{:.1}", f64::from(launch.smem_bytes) / 1024.0),
        launch.spill_bytes.to_string(),
        launch.blocks_per_multiprocessor.to_string(),
        percent(launch.occupancy),
        instructions.join(", "),
    ]
}

/// What both kinds of tables begin with.
fn common(row: &Row) -> Vec<String> {
    vec![
        row.spec.clone(),
        row.shapes.clone(),
        row.format.clone(),
        row.count.to_string(),
        format!("{:.3}", row.bytes / 1e6),
        format!("{:.3}", row.flops / 1e6),
    ]
}

fn total<const N: usize>(step: &StepTable, rest: [String; N]) -> Vec<String> {
    let mut cells = vec!["all".to_owned(), String::new(), String::new()];
    cells.push(
        step.rows
            .iter()
            .map(|row| row.count)
            .sum::<usize>()
            .to_string(),
    );
    cells.push(format!("{:.3}", sum(step, |row| row.bytes) / 1e6));
    cells.push(format!("{:.3}", sum(step, |row| row.flops) / 1e6));
    cells.extend(rest);
    cells
}

fn sum(step: &StepTable, of: fn(&Row) -> f64) -> f64 {
    step.rows.iter().map(|row| of(row) * row.count as f64).sum()
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A table whose columns behind the first few are figures.
pub(crate) fn figures(header: &[impl Display], names: usize) -> Text {
    let mut table = Text::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut().skip(names) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{predicted_table, table, table_of_a_gpu};

    #[test]
    fn a_negative_remainder_is_shown_and_explained() {
        let shown = text(&table_of_a_gpu());
        let first = shown.lines().next().unwrap();
        assert_eq!(
            first,
            "cuda:0 (NVIDIA H200, sm_90a): 4800.0 GB/s of copying, measured in this run; 989000 GFLOP/s of the \
             datasheet of H200"
        );
        let step = &table_of_a_gpu().models[0].steps[0];
        let (kernels, remainder) = (step.kernels_us(), step.remainder_us);
        assert!(remainder < 0.0);
        let expect = format!("kernels one after another {kernels:.1}, remainder {remainder:.1} (-");
        assert!(shown.contains(&expect), "{expect} in {shown}");
        assert!(
            shown.contains("timed by events") && !shown.contains("explain"),
            "{shown}"
        );
    }

    #[test]
    fn other_tables_say_nothing_of_events() {
        let cpu = text(&table(1));
        let first = cpu.lines().next().unwrap();
        assert!(
            first
                .ends_with(": 40.0 GB/s, 220 GFLOP/s, 640 GOP/s of integers; measured in this run"),
            "{first}"
        );
        assert!(cpu.contains("explain") && !cpu.contains("events"), "{cpu}");
        let predicted = text(&predicted_table());
        let first = predicted.lines().next().unwrap();
        assert_eq!(first, "H200: 4800.0 GB/s, 989000 GFLOP/s; of the datasheet");
        assert!(!predicted.contains("events"), "{predicted}");
    }
}
