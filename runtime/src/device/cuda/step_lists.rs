//! A step's lists as kernels read them: one piece of memory, filled on the host and copied in one go.

use super::host_draws::{MAX_SUPPRESSED_IDS, is_made_by_kernel};
use crate::device::{Step, Tokens};
use crate::kv::blocks_for;
use crate::sampling::{Draw, DrawParams};
use kiln_bundle::{
    BLOCK_TOKENS, Bounds, LAST_SAMPLED, StepCounts, StepDraw, StepPointers, StepSequence, StepTile,
    TILE_QUERIES,
};
use std::ops::Range;

use super::DeviceAddress;

/// Lists start at 16-byte boundaries.
const ALIGN_WORDS: usize = 4;

const COUNTS_WORDS: usize = size_of::<StepCounts>() / WORD;
const SEQUENCE_WORDS: usize = size_of::<StepSequence>() / WORD;
const TILE_WORDS: usize = size_of::<StepTile>() / WORD;
const DRAW_WORDS: usize = size_of::<StepDraw>() / WORD;
const WORD: usize = size_of::<u32>();

/// Where the lists of an executable's steps lie, in words (u32).
///
/// Each executable has a layout of its own, and what varies in length most, block tables and
/// suppressed ids, comes last. So a step copies a prefix that is about as long as what it says: a
/// few hundred bytes for a decode step.
#[derive(Clone, Debug)]
pub(super) struct StepLayout {
    token_ids: usize,
    positions: usize,
    kv_slots: usize,
    logit_rows: usize,
    sequences: usize,
    tiles: usize,
    draws: usize,
    /// Block tables, then suppressed ids, of each sequence in turn.
    lists: Range<usize>,
}

impl StepLayout {
    /// Room for every step within `bounds`.
    pub(super) fn new(bounds: &Bounds) -> StepLayout {
        let tokens = bounds.max_tokens as usize;
        let sequences = bounds.max_sequences as usize;
        let tiles = tokens / TILE_QUERIES as usize + sequences;
        let lists = sequences * (blocks_for(bounds.max_kv_len as usize) + MAX_SUPPRESSED_IDS);
        let mut end = 0;
        let mut place = |words: usize| {
            let start = end;
            end = (end + words).next_multiple_of(ALIGN_WORDS);
            start
        };
        // Counts are at 0.
        place(COUNTS_WORDS);
        StepLayout {
            token_ids: place(tokens),
            positions: place(tokens),
            kv_slots: place(tokens),
            logit_rows: place(bounds.max_logit_rows as usize),
            sequences: place(sequences * SEQUENCE_WORDS),
            tiles: place(tiles * TILE_WORDS),
            draws: place(sequences * DRAW_WORDS),
            lists: {
                let start = place(lists);
                start..start + lists
            },
        }
    }

    /// Bytes of device memory that the lists may take.
    pub(super) fn bytes(&self) -> u64 {
        (self.lists.end * WORD) as u64
    }

    /// The addresses of lists at `region`.
    pub(super) fn pointers(
        &self,
        region: DeviceAddress,
        last_sampled: DeviceAddress,
        chosen: DeviceAddress,
    ) -> StepPointers {
        let at = |word: usize| region.offset((word * WORD) as u64).0;
        StepPointers {
            counts: at(0),
            token_ids: at(self.token_ids),
            positions: at(self.positions),
            kv_slots: at(self.kv_slots),
            logit_rows: at(self.logit_rows),
            sequences: at(self.sequences),
            tiles: at(self.tiles),
            draws: at(self.draws),
            lists: at(self.lists.start),
            last_sampled: last_sampled.0,
            chosen: chosen.0,
        }
    }

    /// Writes the lists of a checked step to `words`, as long as they are used. Returns their
    /// counts.
    pub(super) fn fill(&self, step: &Step, vocab_size: u32, words: &mut Vec<u32>) -> StepCounts {
        words.clear();
        words.resize(self.lists.start, 0);
        let mut counts = StepCounts::default();
        for sequence in step.sequences() {
            let rows = sequence.tokens.len() as u32;
            let first_row = counts.tokens;
            let token_ids = &mut words[self.token_ids + first_row as usize..];
            match sequence.tokens {
                Tokens::Ids(ids) => token_ids[..ids.len()].copy_from_slice(ids),
                Tokens::LastSampled => token_ids[0] = LAST_SAMPLED | sequence.slot,
            }
            for row in 0..rows {
                let position = sequence.past_len + row;
                let (block, offset) = (
                    position as usize / BLOCK_TOKENS,
                    position % BLOCK_TOKENS as u32,
                );
                let slot = sequence.block_table[block] * BLOCK_TOKENS as u32 + offset;
                let at = (first_row + row) as usize;
                words[self.positions + at] = position;
                words[self.kv_slots + at] = slot;
            }
            for first_row in (0..rows).step_by(TILE_QUERIES as usize) {
                let tile = StepTile {
                    sequence: counts.sequences,
                    first_row,
                };
                put(words, self.tiles, counts.tiles, tile_words(&tile));
                counts.tiles += 1;
            }
            // Kernels index from where the lists start.
            let block_table = (words.len() - self.lists.start) as u32;
            let blocks = blocks_for((sequence.past_len + rows) as usize);
            words.extend_from_slice(&sequence.block_table[..blocks]);
            let described = StepSequence {
                first_row,
                rows,
                past_len: sequence.past_len,
                block_table,
            };
            put(
                words,
                self.sequences,
                counts.sequences,
                sequence_words(&described),
            );
            let logit_rows = sequence.logit_rows.count(rows as usize) as u32;
            for row in rows - logit_rows..rows {
                words[self.logit_rows + counts.logit_rows as usize] = first_row + row;
                counts.logit_rows += 1;
            }
            if let Some(draw) = sequence.draw {
                let suppressed = words.len();
                let known = |&&id: &&u32| id < vocab_size;
                if is_made_by_kernel(&draw) {
                    words.extend(draw.suppressed_ids.iter().filter(known));
                }
                let described = StepDraw {
                    row: counts.logit_rows - 1,
                    slot: sequence.slot,
                    suppressed: (suppressed - self.lists.start) as u32,
                    suppressed_len: (words.len() - suppressed) as u32,
                    ..parameters(&draw)
                };
                put(words, self.draws, counts.draws, draw_words(&described));
                counts.draws += 1;
            }
            counts.tokens += rows;
            counts.sequences += 1;
        }
        debug_assert!(words.len() <= self.lists.end);
        words[..COUNTS_WORDS].copy_from_slice(&counts_words(&counts));
        counts
    }
}

/// Writes entry `index` of the list at `start`.
fn put<const N: usize>(words: &mut [u32], start: usize, index: u32, entry: [u32; N]) {
    words[start + index as usize * N..][..N].copy_from_slice(&entry);
}

/// The kernel chooses something even where the host chooses after it: then what is least work.
fn parameters(draw: &Draw<'_>) -> StepDraw {
    let params = match is_made_by_kernel(draw) {
        true => draw.params,
        false => DrawParams::GREEDY,
    };
    StepDraw {
        index: draw.index,
        top_k: params.top_k,
        temperature: params.temperature,
        top_p: params.top_p,
        min_p: params.min_p,
        seed_low: params.seed as u32,
        seed_high: (params.seed >> 32) as u32,
        ..StepDraw::default()
    }
}

// The structs of the lists, field for field. All of their fields are of four bytes; the lengths are
// those of the structs, or `put` would not fit.

fn counts_words(counts: &StepCounts) -> [u32; COUNTS_WORDS] {
    let StepCounts {
        tokens,
        sequences,
        logit_rows,
        tiles,
        draws,
    } = *counts;
    [tokens, sequences, logit_rows, tiles, draws]
}

fn sequence_words(sequence: &StepSequence) -> [u32; SEQUENCE_WORDS] {
    let StepSequence {
        first_row,
        rows,
        past_len,
        block_table,
    } = *sequence;
    [first_row, rows, past_len, block_table]
}

fn tile_words(tile: &StepTile) -> [u32; TILE_WORDS] {
    [tile.sequence, tile.first_row]
}

fn draw_words(draw: &StepDraw) -> [u32; DRAW_WORDS] {
    [
        draw.row,
        draw.slot,
        draw.index,
        draw.top_k,
        draw.temperature.to_bits(),
        draw.top_p.to_bits(),
        draw.min_p.to_bits(),
        draw.seed_low,
        draw.seed_high,
        draw.suppressed,
        draw.suppressed_len,
    ]
}

/// The value of the `step` parameter: eleven addresses, little-endian as every CUDA device is.
pub(super) fn pointer_bytes(pointers: &StepPointers) -> Vec<u8> {
    let StepPointers {
        counts,
        token_ids,
        positions,
        kv_slots,
        logit_rows,
        sequences,
        tiles,
        draws,
        lists,
        last_sampled,
        chosen,
    } = *pointers;
    let addresses: [u64; size_of::<StepPointers>() / size_of::<u64>()] = [
        counts,
        token_ids,
        positions,
        kv_slots,
        logit_rows,
        sequences,
        tiles,
        draws,
        lists,
        last_sampled,
        chosen,
    ];
    addresses.iter().flat_map(|a| a.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{LogitRows, SequenceStep};

    const BOUNDS: Bounds = Bounds {
        max_tokens: 160,
        max_sequences: 3,
        max_kv_len: 96,
        max_logit_rows: 70,
    };

    fn list(words: &[u32], start: usize, len: usize) -> &[u32] {
        &words[start..start + len]
    }

    #[test]
    fn a_prefill_step() {
        let layout = StepLayout::new(&BOUNDS);
        let ids: Vec<u32> = (0..66).map(|i| 100 + i).collect();
        let mut step = Step::default();
        step.push(&SequenceStep {
            slot: 2,
            tokens: Tokens::Ids(&ids),
            past_len: 20,
            // One block more than it needs.
            block_table: &[9, 3, 5, 1, 0, 2, 7],
            logit_rows: LogitRows::None,
            draw: None,
        });
        step.push(&SequenceStep {
            slot: 0,
            tokens: Tokens::Ids(&[7, 8, 9]),
            past_len: 0,
            block_table: &[4],
            logit_rows: LogitRows::All,
            draw: Some(Draw {
                params: DrawParams {
                    temperature: 0.5,
                    top_k: 40,
                    top_p: 0.9,
                    min_p: 0.1,
                    seed: 0x1_0000_0002,
                    ..DrawParams::GREEDY
                },
                index: 6,
                suppressed_ids: &[11, 4000, 12],
                ..Draw::GREEDY
            }),
        });
        let mut words = vec![77; 5];
        let counts = layout.fill(&step, 1000, &mut words);
        let expect = StepCounts {
            tokens: 69,
            sequences: 2,
            logit_rows: 3,
            tiles: 3,
            draws: 1,
        };
        assert_eq!(counts, expect);
        assert_eq!(words[..COUNTS_WORDS], [69, 2, 3, 3, 1]);
        assert_eq!(list(&words, layout.token_ids, 66), ids);
        assert_eq!(list(&words, layout.token_ids + 66, 3), [7, 8, 9]);
        let positions: Vec<u32> = (20..86).chain(0..3).collect();
        assert_eq!(list(&words, layout.positions, 69), positions);
        let slots: Vec<u32> = (20..86)
            .map(|p: u32| [9, 3, 5, 1, 0, 2][p as usize / 16] * 16 + p % 16)
            .chain(64..67)
            .collect();
        assert_eq!(list(&words, layout.kv_slots, 69), slots);
        assert_eq!(list(&words, layout.logit_rows, 3), [66, 67, 68]);
        let sequences = [0, 66, 20, 0, 66, 3, 0, 6];
        assert_eq!(list(&words, layout.sequences, 8), sequences);
        assert_eq!(list(&words, layout.tiles, 6), [0, 0, 0, 64, 1, 0]);
        let draw = [
            2,
            0,
            6,
            40,
            0.5f32.to_bits(),
            0.9f32.to_bits(),
            0.1f32.to_bits(),
            2,
            1,
            7,
            2,
        ];
        assert_eq!(list(&words, layout.draws, DRAW_WORDS), draw);
        // Tables without spare blocks, and suppressed ids that the vocabulary has.
        assert_eq!(words[layout.lists.start..], [9, 3, 5, 1, 0, 2, 4, 11, 12]);
    }

    #[test]
    fn a_decode_step_is_short() {
        let bounds = Bounds {
            max_tokens: 1,
            max_sequences: 1,
            max_kv_len: 256,
            max_logit_rows: 1,
        };
        let layout = StepLayout::new(&bounds);
        let mut step = Step::default();
        step.push(&SequenceStep {
            slot: 5,
            tokens: Tokens::LastSampled,
            past_len: 16,
            block_table: &[8, 6],
            logit_rows: LogitRows::Last,
            draw: Some(Draw {
                index: 1,
                ..Draw::GREEDY
            }),
        });
        let mut words = Vec::new();
        layout.fill(&step, 1000, &mut words);
        assert_eq!(words[layout.token_ids], 0x8000_0005);
        assert_eq!(words[layout.positions], 16);
        assert_eq!(words[layout.kv_slots], 96);
        assert_eq!(words[layout.logit_rows], 0);
        assert_eq!(words[layout.lists.start..], [8, 6]);
        assert!(words.len() * WORD < 256, "{}", words.len());
    }

    #[test]
    fn many_suppressed_ids_are_left_to_the_host() {
        let layout = StepLayout::new(&BOUNDS);
        let counted = |len: usize| {
            let suppressed: Vec<u32> = (0..len as u32).collect();
            let mut step = Step::default();
            for slot in 0..3 {
                step.push(&SequenceStep {
                    slot,
                    tokens: Tokens::Ids(&[1]),
                    past_len: 0,
                    block_table: &[0],
                    logit_rows: LogitRows::Last,
                    draw: Some(Draw {
                        suppressed_ids: &suppressed,
                        ..Draw::GREEDY
                    }),
                });
            }
            let mut words = Vec::new();
            layout.fill(&step, u32::MAX, &mut words);
            assert!(words.len() <= layout.lists.end);
            words[layout.draws + DRAW_WORDS - 1]
        };
        assert_eq!(counted(MAX_SUPPRESSED_IDS), MAX_SUPPRESSED_IDS as u32);
        assert_eq!(counted(MAX_SUPPRESSED_IDS + 1), 0);
    }

    #[test]
    fn lists_lie_apart_and_inside() {
        let layout = StepLayout::new(&BOUNDS);
        let pointers = layout.pointers(DeviceAddress(4096), DeviceAddress(1), DeviceAddress(2));
        assert_eq!(pointers.counts, 4096);
        assert_eq!(pointers.positions - pointers.token_ids, 160 * 4);
        assert_eq!(pointers.tiles - pointers.sequences, 3 * 16);
        assert_eq!(pointers.lists, 4096 + layout.lists.start as u64 * 4);
        assert!(pointers.draws + 3 * 44 <= pointers.lists);
        assert_eq!(layout.bytes() as usize, layout.lists.end * 4);
        assert_eq!(pointer_bytes(&pointers).len(), size_of::<StepPointers>());
        assert_eq!(pointer_bytes(&pointers)[..8], 4096u64.to_le_bytes());
        assert_eq!(pointer_bytes(&pointers)[80..], 2u64.to_le_bytes());
    }
}
