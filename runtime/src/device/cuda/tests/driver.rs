//! A driver that keeps the device's memory on the host, notes its calls, and computes just enough to
//! see what it was given.

use super::bundle::{C, LAYER_BYTES, LAYERS, V};
use crate::device::cuda::{
    BoundLaunch, DeviceAddress, Driver, DriverError, GpuFacts, GraphHandle, KernelHandle,
    KernelImage, Ticket,
};
use kiln_bundle::{COPIES_PER_LAUNCH, LAST_SAMPLED, StepDraw};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Call {
    Allocate(u64),
    Load(String),
    Upload(u64, usize),
    Launch(String),
    Record(usize),
    RecordTimed(usize),
    Times(usize),
    Replay(usize),
    Download(u64, usize),
    Wait(u64),
}

#[derive(Default)]
pub(super) struct State {
    pub(super) calls: Vec<Call>,
    memory: Vec<(u64, Vec<u8>)>,
    kernels: Vec<String>,
    graphs: Vec<Vec<BoundLaunch>>,
    downloads: VecDeque<(u64, Vec<u8>)>,
    tickets: u64,
    /// The call that fails from now on.
    pub(super) broken: Option<&'static str>,
}

impl State {
    pub(super) fn at(&mut self, address: u64, len: usize) -> &mut [u8] {
        let found = self.memory.iter_mut().find(|(start, bytes)| {
            (*start..=*start + bytes.len() as u64).contains(&(address + len as u64))
                && *start <= address
        });
        let (start, bytes) = found.expect("an address outside all memory");
        &mut bytes[(address - *start) as usize..][..len]
    }

    pub(super) fn words(&mut self, address: u64, len: usize) -> Vec<u32> {
        let bytes = self.at(address, len * 4).as_chunks::<4>().0.iter();
        bytes.map(|&word| u32::from_le_bytes(word)).collect()
    }

    fn put(&mut self, address: u64, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.at(address, bytes.len()).copy_from_slice(&bytes);
    }

    /// Runs a kernel. `embed` writes position + column, `layer` layer + position * column, as f16;
    /// `head` writes a one to the logit of the token after each row's, and chooses it. `copy` copies
    /// blocks.
    fn execute(&mut self, launch: &BoundLaunch) {
        if self.kernels[launch.kernel.0] == "copy" {
            return self.copy_blocks(launch);
        }
        let address = |index: usize| long(&launch.parameters[index], 0);
        let step = |index: usize| long(&launch.parameters[0], index);
        let [tokens, _, logit_rows, _, draws] = self.words(step(0), 5)[..] else {
            unreachable!()
        };
        let positions = self.words(step(2), tokens as usize);
        match self.kernels[launch.kernel.0].as_str() {
            "embed" => {
                for (row, position) in positions.iter().enumerate() {
                    let values = (0..C).map(|c| (position + c) as f32);
                    self.put_row(address(3), row, values);
                }
            }
            "combine" => {
                for (row, position) in positions.iter().enumerate() {
                    let values = (0..C).map(|c| (position * c) as f32);
                    self.put_row(address(1), row, values);
                }
            }
            "head" => {
                let ids = self.words(step(1), tokens as usize);
                let rows = self.words(step(4), logit_rows as usize);
                let slots = step(9);
                let next: Vec<u32> = rows
                    .iter()
                    .map(|&row| match ids[row as usize] {
                        id if id < LAST_SAMPLED => (id + 1) % V,
                        slot => {
                            let slot = u64::from(slot - LAST_SAMPLED);
                            (self.words(slots + slot * 4, 1)[0] + 1) % V
                        }
                    })
                    .collect();
                for (row, &id) in next.iter().enumerate() {
                    let mut logits = [0; V as usize];
                    logits[id as usize] = 1f32.to_bits();
                    self.put(address(3) + row as u64 * u64::from(V) * 4, &logits);
                }
                for draw in 0..u64::from(draws) {
                    let [row, slot] =
                        self.words(step(7) + draw * size_of::<StepDraw>() as u64, 2)[..]
                    else {
                        unreachable!()
                    };
                    let id = next[row as usize];
                    self.put(step(10) + draw * 4, &[id]);
                    self.put(slots + u64::from(slot) * 4, &[id]);
                }
            }
            _ => {}
        }
    }

    fn copy_blocks(&mut self, launch: &BoundLaunch) {
        let (pairs, _) = launch.parameters[0].as_chunks::<8>();
        assert_eq!(pairs.len(), COPIES_PER_LAUNCH);
        let bytes = (u64::from(LAYERS) * LAYER_BYTES) as usize;
        let block = |index: u32| long(&launch.parameters[1], 0) + u64::from(index) * bytes as u64;
        let pair = |pair: &[u8; 8]| {
            let pair = u64::from_le_bytes(*pair);
            (pair as u32, (pair >> 32) as u32)
        };
        let pairs = pairs.iter().map(pair).take(launch.grid[1] as usize);
        let read: Vec<(u32, Vec<u8>)> = pairs
            .map(|(from, to)| (to, self.at(block(from), bytes).to_vec()))
            .collect();
        for (to, held) in read {
            self.at(block(to), bytes).copy_from_slice(&held);
        }
    }

    fn put_row(&mut self, buffer: u64, row: usize, values: impl Iterator<Item = f32>) {
        let bytes: Vec<u8> = values
            .flat_map(|value| half::f16::from_f32(value).to_le_bytes())
            .collect();
        let at = buffer + (row * bytes.len()) as u64;
        self.at(at, bytes.len()).copy_from_slice(&bytes);
    }
}

/// A word of 8 bytes of a parameter.
pub(super) fn long(parameter: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(parameter.as_chunks::<8>().0[index])
}

#[derive(Clone)]
pub(super) struct FakeDriver {
    facts: GpuFacts,
    state: Arc<Mutex<State>>,
}

impl FakeDriver {
    pub(super) fn new(free_bytes: u64) -> FakeDriver {
        FakeDriver {
            facts: GpuFacts {
                name: "Fake GPU".to_owned(),
                compute_capability: (9, 0),
                multiprocessors: 4,
                max_smem_bytes: 1 << 17,
                total_bytes: free_bytes,
                free_bytes,
            },
            state: Arc::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }

    /// Notes a call, which may be one that is to fail.
    fn note(&self, name: &'static str, call: Call) -> Result<MutexGuard<'_, State>, DriverError> {
        let mut state = self.state();
        state.calls.push(call);
        match state.broken {
            Some(broken) if broken == name => Err(DriverError {
                call: name,
                place: String::new(),
                problem: "CUDA_ERROR_ILLEGAL_ADDRESS".to_owned(),
            }),
            _ => Ok(state),
        }
    }
}

impl Driver for FakeDriver {
    fn facts(&self) -> &GpuFacts {
        &self.facts
    }

    fn allocate(&mut self, bytes: u64) -> Result<DeviceAddress, DriverError> {
        let mut state = self.note("allocate", Call::Allocate(bytes))?;
        let last = state.memory.last();
        let end = last.map_or(1 << 40, |(start, bytes)| start + bytes.len() as u64);
        let start = (end + 1).next_multiple_of(1 << 20);
        state.memory.push((start, vec![0; bytes as usize]));
        Ok(DeviceAddress(start))
    }

    fn load(&mut self, image: &KernelImage) -> Result<KernelHandle, DriverError> {
        let mut state = self.note("load", Call::Load(image.entry.clone()))?;
        assert!(image.source.is_file());
        state.kernels.push(image.entry.clone());
        Ok(KernelHandle(state.kernels.len() - 1))
    }

    fn upload(&mut self, to: DeviceAddress, bytes: &[u8]) -> Result<(), DriverError> {
        let mut state = self.note("upload", Call::Upload(to.0, bytes.len()))?;
        state.at(to.0, bytes.len()).copy_from_slice(bytes);
        Ok(())
    }

    fn launch(&mut self, launch: &BoundLaunch) -> Result<(), DriverError> {
        let mut state = self.note("launch", Call::Launch(launch.place.clone()))?;
        state.execute(launch);
        Ok(())
    }

    fn record(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError> {
        let mut state = self.note("record", Call::Record(launches.len()))?;
        state.graphs.push(launches.to_vec());
        Ok(GraphHandle(state.graphs.len() - 1))
    }

    fn record_timed(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError> {
        let mut state = self.note("record_timed", Call::RecordTimed(launches.len()))?;
        state.graphs.push(launches.to_vec());
        Ok(GraphHandle(state.graphs.len() - 1))
    }

    /// 1, 2, 4, 8 ... us, so that a sum tells what is in it.
    fn launch_times(&mut self, graph: GraphHandle) -> Result<Vec<Duration>, DriverError> {
        let state = self.note("launch_times", Call::Times(graph.0))?;
        let launches = 0..state.graphs[graph.0].len();
        Ok(launches.map(|i| Duration::from_micros(1 << i)).collect())
    }

    fn replay(&mut self, graph: GraphHandle) -> Result<(), DriverError> {
        let mut state = self.note("replay", Call::Replay(graph.0))?;
        for launch in state.graphs[graph.0].clone() {
            state.execute(&launch);
        }
        Ok(())
    }

    fn download(&mut self, from: DeviceAddress, bytes: usize) -> Result<Ticket, DriverError> {
        let mut state = self.note("download", Call::Download(from.0, bytes))?;
        let data = state.at(from.0, bytes).to_vec();
        state.tickets += 1;
        let ticket = state.tickets;
        state.downloads.push_back((ticket, data));
        Ok(Ticket(ticket))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Vec<u8>, DriverError> {
        let mut state = self.note("wait", Call::Wait(ticket.0))?;
        let (oldest, data) = state.downloads.pop_front().unwrap();
        assert_eq!(oldest, ticket.0, "tickets are redeemed in their order");
        Ok(data)
    }
}
