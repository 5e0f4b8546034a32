//! Times the kernels of real steps on a device.
//!
//! Steps go to the device as the engine sends them, so that weights pass through the caches as they do
//! in use. Keys and values are those of a real prompt, and from step to step the tokens and the blocks
//! of sequences change. Steps with a clock around their kernels take turns with steps without, and the
//! latter say how long a step takes. A GPU has events for a clock, and runs kernels one after another
//! where they are timed: what its kernels sum to is held against the step of the same turn without.

use super::error::TableError;
use super::kinds::{Kind, kinds};
use super::steps::StepPlan;
use crate::table::{Ceilings, Row, StepTable, Times};
use kiln_bundle::{Executable, Phase, Target};
use kiln_runtime::device::{Device, KernelTime, LogitRows, SequenceStep, Step, StepOutput, Tokens};
use kiln_runtime::{BlockCopy, Draw, blocks_for};
use std::time::{Duration, Instant};

/// Steps of a plan before those that count.
const WARM_UP: usize = 2;

/// A step's table, and what it does not say.
pub struct Measured {
    /// The table; its floors are 0 until [`Measured::set_floors`].
    pub step: StepTable,
    /// Of each of its rows.
    pub kinds: Vec<Kind>,
}

impl Measured {
    /// Says how long the rows take at the least.
    pub fn set_floors(&mut self, ceilings: &Ceilings) {
        self.step.floor_us = 0.0;
        for (row, kind) in self.step.rows.iter_mut().zip(&self.kinds) {
            let rate = ceilings.operations_per_ns(kind.arithmetic);
            row.floor_us = kind.work.floor_us(ceilings.read_gb_per_s, rate);
            self.step.floor_us += row.floor_us * row.count as f64;
        }
    }
}

/// Times `repeat` steps with and as many without a clock around kernels, for each plan. `progress` is
/// called after each step that counts.
///
/// # Errors
/// [`TableError::KvCache`], [`TableError::Device`], [`TableError::NoKernelTimes`].
pub fn measure(
    device: &mut dyn Device,
    target: &Target,
    plans: &[StepPlan],
    repeat: usize,
    progress: &dyn Fn(),
) -> Result<Vec<Measured>, TableError> {
    let mut driver = Driver::new(device, plans)?;
    driver.fill(plans)?;
    let measured = plans
        .iter()
        .map(|plan| measure_step(&mut driver, target, plan, repeat, progress));
    measured.collect()
}

fn measure_step(
    driver: &mut Driver<'_>,
    target: &Target,
    plan: &StepPlan,
    repeat: usize,
    progress: &dyn Fn(),
) -> Result<Measured, TableError> {
    let executable = &target.executables[plan.executable];
    let program = &target.programs[executable.program as usize];
    for _ in 0..WARM_UP {
        driver.step(plan, false)?;
    }
    let (mut plain, mut timed, mut kernels) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..2 * repeat {
        // With and without, without and with: neither always follows the other.
        let with_clock = matches!(turn % 4, 0 | 3);
        let (time, output) = driver.step(plan, with_clock)?;
        if with_clock {
            if output.kernel_times.len() != program.kernels.len() {
                return Err(TableError::NoKernelTimes {
                    device: driver.device.facts().name.clone(),
                });
            }
            timed.push(microseconds(time));
            kernels.push(output.kernel_times);
        } else {
            plain.push(microseconds(time));
        }
        progress();
    }
    // Where a clock changes how kernels run, the step that has one is of another kind.
    let whole = match driver.device.times_in_passing() {
        true => &timed,
        false => &plain,
    };
    let of_turn = |(step, kernels): (&f64, &Vec<KernelTime>)| {
        let sum: Duration = kernels.iter().map(|kernel| kernel.length).sum();
        step - microseconds(sum)
    };
    let remainders = whole.iter().zip(&kernels).map(of_turn).collect();
    let kinds = kinds(target, program, plan, |_| ());
    let time = Times::of(plain);
    let row = |kind: &Kind| row(kind, &kernels, time.median_us);
    let rows = kinds.iter().map(row).collect();
    let remainder_us = Times::of(remainders).median_us;
    let step = step_table(executable, plan, rows, time, remainder_us);
    Ok(Measured { step, kinds })
}

/// A row of the table, and the sum of its kernels' shares.
fn row(kind: &Kind, steps: &[Vec<KernelTime>], step_us: f64) -> Row {
    let count = kind.kernels.len();
    let mean = |times: &Vec<KernelTime>| {
        let sum: Duration = kind.kernels.iter().map(|&index| times[index].length).sum();
        // To a nanosecond.
        (microseconds(sum) / count as f64 * 1e3).round() / 1e3
    };
    let time = Times::of(steps.iter().map(mean).collect());
    Row {
        kernel: kind.kernel.to_owned(),
        spec: kind.spec.clone(),
        shapes: kind.shapes.clone(),
        format: kind.format.clone(),
        count,
        bytes: kind.work.bytes,
        flops: kind.work.flops,
        floor_us: 0.0,
        share_of_step: time.median_us * count as f64 / step_us,
        time,
        references: Vec::new(),
        resources: None,
        prepared_by: Vec::new(),
    }
}

/// A step of these rows.
pub(crate) fn step_table(
    executable: &Executable,
    plan: &StepPlan,
    rows: Vec<Row>,
    time: Times,
    remainder_us: f64,
) -> StepTable {
    let floors = rows.iter().map(|row| row.floor_us * row.count as f64);
    StepTable {
        executable: executable.name.clone(),
        phase: executable.phase,
        sequences: plan.sequences,
        tokens: plan.tokens(),
        kv_len: plan.kv_len,
        logit_rows: plan.logit_rows(),
        floor_us: floors.sum(),
        remainder_us,
        rows,
        time,
    }
}

/// A device with the blocks of its KV cache dealt to sequences.
struct Driver<'a> {
    device: &'a mut dyn Device,
    /// Of as many positions as the longest plan has, all written before decode is timed.
    tables: Vec<Vec<u32>>,
    /// Steps so far.
    round: usize,
    step: Step,
}

impl<'a> Driver<'a> {
    /// Twice as many tables as the largest step has sequences, where there is room, so that a sequence's
    /// keys and values lie elsewhere in the next step.
    fn new(device: &'a mut dyn Device, plans: &[StepPlan]) -> Result<Driver<'a>, TableError> {
        let blocks = plans.iter().map(|plan| blocks_for(plan.kv_len)).max();
        let blocks = blocks.unwrap_or(1);
        let found = device.facts().kv_blocks as usize;
        let most = plans.iter().map(|plan| plan.sequences).max().unwrap_or(1);
        let count = (2 * most).min(found / blocks);
        if let Some(plan) = plans.iter().find(|plan| plan.sequences > count) {
            return Err(TableError::KvCache {
                executable: device.executables()[plan.executable].name.clone(),
                sequences: plan.sequences,
                kv_len: plan.kv_len,
                needed: plan.sequences * blocks,
                found,
            });
        }
        let table = |index: usize| (index * blocks..(index + 1) * blocks).map(|block| block as u32);
        Ok(Driver {
            device,
            tables: (0..count).map(|index| table(index).collect()).collect(),
            round: 0,
            step: Step::default(),
        })
    }

    /// Writes keys and values wherever decode will read: a prompt into the first table, and copies of it
    /// into the others.
    fn fill(&mut self, plans: &[StepPlan]) -> Result<(), TableError> {
        let executables = self.device.executables().to_vec();
        let decode = |plan: &&StepPlan| executables[plan.executable].phase == Phase::Decode;
        let decodes = plans.iter().filter(decode);
        let Some(positions) = decodes.map(|plan| plan.kv_len).max() else {
            return Ok(());
        };
        let prefills = executables.iter().enumerate();
        let prefill = prefills
            .filter(|(_, executable)| executable.phase == Phase::Prefill)
            .max_by_key(|(_, executable)| executable.bounds.max_tokens);
        let Some((executable, bucket)) = prefill else {
            return Ok(());
        };
        for past in (0..positions).step_by(bucket.bounds.max_tokens.max(1) as usize) {
            let end = positions.min(past + bucket.bounds.max_tokens as usize);
            let ids: Vec<u32> = (past..end)
                .map(|position| arbitrary_id(0, position))
                .collect();
            self.step.clear();
            self.step.executable = executable;
            self.step.push(&SequenceStep {
                slot: 0,
                tokens: Tokens::Ids(&ids),
                past_len: past as u32,
                block_table: &self.tables[0],
                logit_rows: LogitRows::Last,
                draw: Some(Draw::GREEDY),
            });
            self.run()?;
        }
        // Once more: a step's copies are made before its kernels.
        self.step.copies = self.copies();
        self.run()?;
        Ok(())
    }

    /// From the first table to each of the others.
    fn copies(&self) -> Vec<BlockCopy> {
        let others = self.tables[1..].iter().flat_map(|table| {
            let pairs = self.tables[0].iter().zip(table);
            pairs.map(|(&from, &to)| BlockCopy { from, to })
        });
        others.collect()
    }

    /// The next step of a plan: other tokens than in the last one, other blocks.
    fn step(
        &mut self,
        plan: &StepPlan,
        kernel_times: bool,
    ) -> Result<(Duration, StepOutput), TableError> {
        self.step.clear();
        self.step.executable = plan.executable;
        self.step.observe.kernel_times = kernel_times;
        let mut ids = Vec::new();
        for sequence in 0..plan.sequences {
            let place = self.round * plan.sequences + sequence;
            ids.clear();
            ids.extend(
                (plan.past()..plan.kv_len).map(|position| arbitrary_id(place + 1, position)),
            );
            self.step.push(&SequenceStep {
                slot: sequence as u32,
                tokens: Tokens::Ids(&ids),
                past_len: plan.past() as u32,
                block_table: &self.tables[place % self.tables.len()],
                logit_rows: LogitRows::Last,
                draw: Some(Draw::GREEDY),
            });
        }
        self.round += 1;
        self.run()
    }

    fn run(&mut self) -> Result<(Duration, StepOutput), TableError> {
        let start = Instant::now();
        let id = self.device.submit(&self.step)?;
        let output = self.device.collect(id)?;
        Ok((start.elapsed(), output))
    }
}

/// A prompt's token: arbitrary, the same for the same place.
pub(crate) fn arbitrary_id(salt: usize, position: usize) -> u32 {
    /// Ids that every vocabulary of these models has.
    const IDS: usize = 200;
    let mixed = position.wrapping_mul(7919) ^ salt.wrapping_mul(104_729);
    (3 + mixed % IDS) as u32
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_bundle::{
        Bounds, Buffer, BufferId, DType, KernelSpec, Program, RowKind, WeightFormat,
        packing::Layout,
    };
    use kiln_runtime::device::{DeviceError, DeviceFacts, MemoryNeed, StepId};
    use std::thread::sleep;

    /// A plain step takes at least so long, and one whose kernel is timed.
    const STEP: Duration = Duration::from_millis(1);
    const TIMED_STEP: Duration = Duration::from_millis(50);
    /// What the device says of its kernel: more than any step takes on a machine that is busy.
    const KERNEL: Duration = Duration::from_secs(100);

    struct FakeGpu {
        facts: DeviceFacts,
        executables: Vec<Executable>,
        in_passing: bool,
        timed: bool,
    }

    impl Device for FakeGpu {
        fn facts(&self) -> &DeviceFacts {
            &self.facts
        }

        fn executables(&self) -> &[Executable] {
            &self.executables
        }

        fn pipeline_depth(&self) -> usize {
            1
        }

        fn times_in_passing(&self) -> bool {
            self.in_passing
        }

        fn submit(&mut self, step: &Step) -> Result<StepId, DeviceError> {
            self.timed = step.observe.kernel_times;
            Ok(StepId(0))
        }

        fn collect(&mut self, _: StepId) -> Result<StepOutput, DeviceError> {
            sleep(if self.timed { TIMED_STEP } else { STEP });
            let time = KernelTime {
                start: Duration::ZERO,
                length: KERNEL,
            };
            Ok(StepOutput {
                kernel_times: vec![time; usize::from(self.timed)],
                ..StepOutput::default()
            })
        }
    }

    /// One kernel, which chooses tokens.
    fn target() -> Target {
        let logits = Buffer {
            rows: RowKind::Logits,
            width: 8,
            dtype: DType::F32,
        };
        let bounds = Bounds {
            max_tokens: 1,
            max_sequences: 1,
            max_kv_len: 16,
            max_logit_rows: 1,
            hidden_states: true,
        };
        Target {
            name: "sm_90a".to_owned(),
            activations: None,
            weights: WeightFormat::F16,
            exceptions: Default::default(),
            tables: DType::F16,
            dtype: DType::F16,
            layout: Layout::Tiles,
            weights_file: String::new(),
            programs: vec![Program {
                name: "decode".to_owned(),
                buffers: vec![logits],
                kernels: vec![KernelSpec::Sample {
                    logits: BufferId(0),
                }],
                logits: BufferId(0),
                hidden_states: Vec::new(),
            }],
            executables: vec![Executable {
                name: "decode-b1-kv16".to_owned(),
                phase: Phase::Decode,
                program: 0,
                bounds,
                arena_bytes: 32,
                offsets_bytes: vec![0],
                launches: Vec::new(),
                workspace_bytes: 0,
                counters: 0,
            }],
            images: Vec::new(),
            copy_blocks: None,
        }
    }

    fn measured(in_passing: bool) -> StepTable {
        let target = target();
        let mut device = FakeGpu {
            facts: DeviceFacts {
                name: "fake".to_owned(),
                target: target.name.clone(),
                gpu: Some(0),
                slots: 1,
                kv_blocks: 2,
                memory: MemoryNeed::default(),
                available_bytes: None,
            },
            executables: target.executables.clone(),
            in_passing,
            timed: false,
        };
        let plan = StepPlan {
            executable: 0,
            sequences: 1,
            new_tokens: 1,
            kv_len: 9,
        };
        let steps = measure(&mut device, &target, &[plan], 3, &|| ()).unwrap();
        steps[0].step.clone()
    }

    #[test]
    fn kernels_that_are_timed_apart_are_held_against_plain_steps() {
        let step = measured(false);
        assert_eq!(step.rows[0].time.median_us, 1e8);
        let remainder = step.time.median_us - 1e8;
        assert!(
            remainder < 0.0 && (step.remainder_us - remainder).abs() < 1e-3,
            "{step:?}"
        );
    }

    #[test]
    fn kernels_that_are_timed_in_passing_are_held_against_their_own_steps() {
        let step = measured(true);
        assert!(step.remainder_us + 1e8 >= 50_000.0, "{step:?}");
    }
}
