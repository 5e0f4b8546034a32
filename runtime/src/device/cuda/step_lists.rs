//! A step's lists as kernels read them: one piece of memory, filled on the host and copied in one go.

use super::bind::Addresses;
use super::draws::{DrawWriter, MAX_DRAW_WORDS, Slot, is_made_by_kernel, placeholder};
use crate::device::{Step, Tokens};
use crate::kv::blocks_for;
use kiln_bundle::{
    BLOCK_TOKENS, Bounds, LAST_SAMPLED, StepCounts, StepDraw, StepPointers, StepSequence, StepTile,
    TILE_QUERIES,
};
use std::ops::Range;

/// Lists start at 16-byte boundaries.
const ALIGN_WORDS: usize = 4;

const COUNTS_WORDS: usize = size_of::<StepCounts>() / WORD;
const SEQUENCE_WORDS: usize = size_of::<StepSequence>() / WORD;
const TILE_WORDS: usize = size_of::<StepTile>() / WORD;
const DRAW_WORDS: usize = size_of::<StepDraw>() / WORD;
const WORD: usize = size_of::<u32>();

/// Where the lists of an executable's steps lie, in words (u32).
///
/// Each executable has a layout of its own, and what varies in length most, block tables and what
/// processors read, comes last. So a step copies a prefix that is about as long as what it says: a
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
    /// Block tables, then what processors read, of each sequence in turn.
    lists: Range<usize>,
}

/// What is known of the slots that a step names.
pub(super) struct SlotGround<'a> {
    /// V.
    pub(super) vocab_size: u32,
    pub(super) slots: &'a [Slot],
    /// Words between the histories of two slots.
    pub(super) history_stride: u32,
}

impl StepLayout {
    /// Room for every step within `bounds`.
    pub(super) fn new(bounds: &Bounds) -> StepLayout {
        let tokens = bounds.max_tokens as usize;
        let sequences = bounds.max_sequences as usize;
        let tiles = tokens / TILE_QUERIES as usize + sequences;
        let history = bounds.max_kv_len as usize;
        let lists = sequences * (blocks_for(history) + history + MAX_DRAW_WORDS);
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

    /// The addresses of the lists, and of what belongs to the slots.
    pub(super) fn pointers(&self, addresses: &Addresses) -> StepPointers {
        let at = |word: usize| addresses.step.offset((word * WORD) as u64).0;
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
            last_sampled: addresses.last_sampled.0,
            chosen: addresses.chosen.0,
            continuations: addresses.continuations.0,
            histories: addresses.histories.0,
            token_counts: addresses.token_counts.0,
        }
    }

    /// Writes the lists of a checked step to `words`, as long as they are used. Returns their
    /// counts.
    pub(super) fn fill(
        &self,
        step: &Step,
        ground: &SlotGround<'_>,
        words: &mut Vec<u32>,
    ) -> StepCounts {
        let mut continuations = 0;
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
                let mut writer = DrawWriter {
                    words,
                    start: self.lists.start,
                    vocab_size: ground.vocab_size,
                };
                let slot = &ground.slots[sequence.slot as usize];
                let kept = sequence.slot * ground.history_stride;
                let described = match is_made_by_kernel(&draw, ground.vocab_size) {
                    true => writer.describe(&sequence, &draw, slot, kept),
                    false => placeholder(sequence.slot),
                };
                let described = StepDraw {
                    row: counts.logit_rows - 1,
                    continuations,
                    ..described
                };
                continuations += described.continuations_len;
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
        draw.processed,
        draw.forced,
        draw.history,
        draw.history_len,
        draw.prompt_len,
        draw.given,
        draw.given_from,
        draw.biases,
        draw.biases_len,
        draw.repetition_penalty.to_bits(),
        draw.presence_penalty.to_bits(),
        draw.frequency_penalty.to_bits(),
        draw.no_repeat_ngram_size,
        draw.words,
        draw.words_len,
        draw.suppressed,
        draw.suppressed_len,
        draw.ends,
        draw.ends_len,
        draw.ending_share.to_bits(),
        draw.beam_score.to_bits(),
        draw.continuations,
        draw.continuations_len,
    ]
}

/// The value of the `step` parameter: fourteen addresses, little-endian as every CUDA device is.
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
        continuations,
        histories,
        token_counts,
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
        continuations,
        histories,
        token_counts,
    ];
    addresses.iter().flat_map(|a| a.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::DeviceAddress;
    use crate::device::{LogitRows, SequenceStep};
    use crate::sampling::{Draw, DrawParams, Processors, Rules, SequenceBias};
    use kiln_bundle::NO_TOKEN;
    use std::sync::Arc;

    fn ground(vocab_size: u32) -> SlotGround<'static> {
        const SLOT: Slot = Slot {
            sampled: false,
            history_len: 0,
            counted: true,
        };
        SlotGround {
            vocab_size,
            slots: &[SLOT; 6],
            history_stride: 97,
        }
    }

    const BOUNDS: Bounds = Bounds {
        max_tokens: 160,
        max_sequences: 3,
        max_kv_len: 96,
        max_logit_rows: 70,
        hidden_states: true,
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
        let counts = layout.fill(&step, &ground(1000), &mut words);
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
        let draw = StepDraw {
            row: 2,
            slot: 0,
            index: 6,
            top_k: 40,
            temperature: 0.5,
            top_p: 0.9,
            min_p: 0.1,
            seed_low: 2,
            seed_high: 1,
            processed: 1,
            forced: NO_TOKEN,
            repetition_penalty: 1.0,
            suppressed: 7,
            suppressed_len: 2,
            ..StepDraw::default()
        };
        assert_eq!(list(&words, layout.draws, DRAW_WORDS), draw_words(&draw));
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
            hidden_states: true,
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
        layout.fill(&step, &ground(1000), &mut words);
        assert_eq!(words[layout.token_ids], 0x8000_0005);
        assert_eq!(words[layout.positions], 16);
        assert_eq!(words[layout.kv_slots], 96);
        assert_eq!(words[layout.logit_rows], 0);
        assert_eq!(words[layout.lists.start..], [8, 6]);
        assert!(words.len() * WORD < 512, "{}", words.len());
    }

    /// The lists of a draw for a sequence in slot 2, which has counted nothing, and the draw.
    fn described(tokens: Tokens<'_>, past_len: u32, draw: Draw<'_>) -> (Vec<u32>, StepDraw) {
        let sequence = SequenceStep {
            slot: 2,
            tokens,
            past_len,
            block_table: &[0],
            logit_rows: LogitRows::Last,
            draw: Some(draw),
        };
        // Lists may begin anywhere.
        let mut words = vec![77; 5];
        let mut writer = DrawWriter {
            words: &mut words,
            start: 5,
            vocab_size: 100,
        };
        let described = writer.describe(&sequence, &draw, &Slot::default(), 194);
        (words.split_off(5), described)
    }

    #[test]
    fn processors_are_lists() {
        let bias = |ids: &[u32], bias| SequenceBias {
            ids: ids.to_vec(),
            bias,
        };
        let rules = Arc::new(Rules {
            processors: Processors {
                sequence_bias: vec![
                    bias(&[9], 0.5),
                    bias(&[7, 8, 4], -1.0),
                    bias(&[9], 0.25),
                    bias(&[100], 3.0),
                ],
                repetition_penalty: 1.5,
                frequency_penalty: 0.1,
                bad_words_ids: vec![vec![5], vec![2], vec![6, 3]],
                exponential_decay_length_penalty: Some((1, 2.0)),
                ..Processors::NONE
            },
            prompt_len: 2,
            max_new_tokens: 9,
            ends: vec![2, 50],
        });
        let draw = Draw {
            index: 3,
            suppressed_ids: &[40, 400],
            rules: Some(&rules),
            history: &[11, 12, 13, 14, 15],
            ..Draw::GREEDY
        };
        let (lists, found) = described(Tokens::Ids(&[14, 15]), 3, draw);
        let part = |start: u32, len: u32| &lists[start as usize..][..len as usize];
        assert_eq!((found.slot, found.history, found.history_len), (2, 194, 5));
        assert_eq!((found.given, found.prompt_len, found.processed), (1, 2, 1));
        assert_eq!(part(found.given_from, 5), [11, 12, 13, 14, 15]);
        // By token, and those of one in their order.
        let biases = part(found.biases, 4 * found.biases_len);
        let (biases, _) = biases.as_chunks::<4>();
        let by_token: Vec<(u32, f32)> = biases
            .iter()
            .map(|rule| (rule[0], f32::from_bits(rule[1])))
            .collect();
        assert_eq!(by_token, [(4, -1.0), (9, 0.5), (9, 0.25)]);
        assert_eq!(
            biases.iter().map(|rule| rule[3]).collect::<Vec<_>>(),
            [2, 0, 0]
        );
        assert_eq!(found.words_len, 1);
        let [3, _, _, 1] = *part(found.words, 4) else {
            panic!("{found:?}")
        };
        // An end of the sequence is no bad word.
        assert_eq!(part(found.suppressed, found.suppressed_len), [40, 5]);
        assert_eq!(part(found.ends, found.ends_len), [2, 50]);
        assert_eq!((found.ending_share, found.repetition_penalty), (3.0, 1.5));

        // The slot has the tokens, but did not count the last one.
        let draw = Draw {
            history: &[],
            ..draw
        };
        let (_, found) = described(Tokens::LastSampled, 4, draw);
        assert_eq!((found.history_len, found.given), (5, 2));
        // One that reads no tokens keeps none.
        let (_, found) = described(Tokens::LastSampled, 4, Draw::GREEDY);
        assert_eq!((found.history_len, found.given, found.processed), (0, 0, 0));
    }

    #[test]
    fn lists_lie_apart_and_inside() {
        let layout = StepLayout::new(&BOUNDS);
        let pointers = layout.pointers(&Addresses {
            step: DeviceAddress(4096),
            chosen: DeviceAddress(2),
            ..Addresses::default()
        });
        assert_eq!(pointers.counts, 4096);
        assert_eq!(pointers.positions - pointers.token_ids, 160 * 4);
        assert_eq!(pointers.tiles - pointers.sequences, 3 * 16);
        assert_eq!(pointers.lists, 4096 + layout.lists.start as u64 * 4);
        assert!(pointers.draws + 3 * size_of::<StepDraw>() as u64 <= pointers.lists);
        assert_eq!(layout.bytes() as usize, layout.lists.end * 4);
        assert_eq!(pointer_bytes(&pointers).len(), size_of::<StepPointers>());
        assert_eq!(pointer_bytes(&pointers)[..8], 4096u64.to_le_bytes());
        assert_eq!(pointer_bytes(&pointers)[80..88], 2u64.to_le_bytes());
    }
}
