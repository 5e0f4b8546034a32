//! Text to token ids and back.
//!
//! Generated text is given out as it comes: never half a character, since a byte-level token may end
//! within one, and never a part of what may become a stop string.

use std::path::{Path, PathBuf};

/// A bundle's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

/// Why text and ids cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is damaged or missing: the bundle's fault.
    #[error("cannot load the tokenizer {}: {problem}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What the library says.
        problem: String,
    },
    /// The library refuses the text.
    #[error("cannot tokenize the prompt: {0}")]
    Encode(String),
    /// The library refuses the ids.
    #[error("cannot turn generated ids into text: {0}")]
    Decode(String),
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Load`].
    pub fn from_file(path: &Path) -> Result<Tokenizer, TokenizerError> {
        let error = |problem: String| TokenizerError::Load {
            path: path.to_owned(),
            problem,
        };
        let json = std::fs::read(path).map_err(|e| error(e.to_string()))?;
        Tokenizer::from_json(&json).map_err(error)
    }

    fn from_json(json: &[u8]) -> Result<Tokenizer, String> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|e| e.to_string())?;
        // A prompt is taken as it is: too long is an error, and nothing is padded.
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        inner.with_padding(None);
        Ok(Tokenizer { inner })
    }

    /// The ids of `text`, with what the tokenizer adds around it (OPT: a leading `</s>`).
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, true);
        let encoding = encoding.map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of `text` that goes on after other text: those of [`Tokenizer::encode`] without what it
    /// adds around them.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode_more(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, false);
        let encoding = encoding.map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner
            .decode(ids, true)
            .map_err(|e| TokenizerError::Decode(e.to_string()))
    }

    /// What one token stands for, special tokens by their names. A token within a character has a
    /// replacement character.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn token_text(&self, id: u32) -> Result<String, TokenizerError> {
        self.inner
            .decode(&[id], false)
            .map_err(|e| TokenizerError::Decode(e.to_string()))
    }
}

/// The text of one sequence as it is generated.
#[derive(Debug, Default)]
pub struct TextStream {
    /// Tokens whose text has not been given out whole.
    window: Vec<u32>,
    /// Bytes of the window's text that have.
    given_bytes: usize,
    stops: StopMatcher,
}

/// What a token adds to a stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TextDelta {
    /// Text that is certain now.
    pub text: String,
    /// Whether a stop string has been completed; the text ends before it.
    pub stopped: bool,
}

impl TextStream {
    /// A stream that ends before the first of `stops`.
    pub fn new(stops: Vec<String>) -> TextStream {
        TextStream {
            stops: StopMatcher::new(stops),
            ..TextStream::default()
        }
    }

    /// Takes the next token.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<TextDelta, TokenizerError> {
        self.window.push(id);
        let text = tokenizer.decode(&self.window)?;
        // The last character may be the beginning of one that the next token completes. Replacement
        // characters before it stand for bytes that nothing can complete any more.
        let certain = text
            .strip_suffix(char::REPLACEMENT_CHARACTER)
            .unwrap_or(&text);
        let fresh = certain.get(self.given_bytes..).unwrap_or_default();
        let delta = self.stops.push(fresh);
        self.given_bytes = certain.len().max(self.given_bytes);
        if certain.len() == text.len() {
            self.window.clear();
            self.given_bytes = 0;
        }
        Ok(delta)
    }

    /// What was held back, when no more tokens come.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<TextDelta, TokenizerError> {
        let text = tokenizer.decode(&self.window)?;
        let mut delta = self
            .stops
            .push(text.get(self.given_bytes..).unwrap_or_default());
        self.window.clear();
        self.given_bytes = 0;
        if !delta.stopped {
            delta.text += &std::mem::take(&mut self.stops.held);
        }
        Ok(delta)
    }
}

/// Finds stop strings in text that comes in pieces.
#[derive(Debug, Default)]
struct StopMatcher {
    stops: Vec<String>,
    /// The end of the text so far, where a stop string may have begun.
    held: String,
}

impl StopMatcher {
    fn new(stops: Vec<String>) -> StopMatcher {
        StopMatcher {
            stops,
            held: String::new(),
        }
    }

    fn push(&mut self, text: &str) -> TextDelta {
        self.held += text;
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        if let Some(start) = found {
            self.held.truncate(start);
            return TextDelta {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        // Keep the longest end that begins a stop string.
        let keep = self
            .held
            .char_indices()
            .map(|(index, _)| index)
            .find(|&index| {
                self.stops
                    .iter()
                    .any(|stop| stop.starts_with(&self.held[index..]))
            });
        let rest = self.held.split_off(keep.unwrap_or(self.held.len()));
        TextDelta {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Map, Value, json};

    /// The characters by which GPT-2 writes the 256 bytes.
    fn byte_characters() -> Vec<char> {
        let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
        let mut next = 256;
        (0..256)
            .map(|b| {
                let code = if printable(b) {
                    b
                } else {
                    next += 1;
                    next - 1
                };
                char::from_u32(code).unwrap()
            })
            .collect()
    }

    /// A byte-level tokenizer: id of byte b is b + 1, `</s>` is 0 and is put before a text, 257 is
    /// "he", 258 is "llo".
    pub(crate) fn byte_tokenizer() -> Tokenizer {
        let mut vocab = Map::new();
        vocab.insert("</s>".to_owned(), json!(0));
        for (b, c) in byte_characters().iter().enumerate() {
            vocab.insert(c.to_string(), json!(b + 1));
        }
        for (i, piece) in ["he", "llo", "ll"].iter().enumerate() {
            vocab.insert((*piece).to_owned(), json!(257 + i));
        }
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let end = json!({"id": "</s>", "ids": [0], "tokens": ["</s>"]});
        let json = json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [{"id": 0, "content": "</s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "normalizer": null,
            "pre_tokenizer": byte_level,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"</s>": end}},
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "vocab": Value::Object(vocab), "merges": [["h", "e"], ["l", "l"], ["ll", "o"]]}
        });
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    fn ids(bytes: &[u8]) -> Vec<u32> {
        bytes.iter().map(|&b| u32::from(b) + 1).collect()
    }

    /// The pieces that a stream gives out, the final one last, and whether it stopped.
    fn stream(stops: &[&str], ids: &[u32]) -> (Vec<String>, bool) {
        let tokenizer = byte_tokenizer();
        let mut stream = TextStream::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut pieces = Vec::new();
        for &id in ids {
            let delta = stream.push(&tokenizer, id).unwrap();
            pieces.push(delta.text);
            if delta.stopped {
                return (pieces, true);
            }
        }
        let delta = stream.finish(&tokenizer).unwrap();
        pieces.push(delta.text);
        (pieces, delta.stopped)
    }

    #[test]
    fn encodes_with_the_special_token_and_without_truncation() {
        let tokenizer = byte_tokenizer();
        let encoded = tokenizer.encode("hello hello").unwrap();
        assert_eq!(encoded, [0, 257, 258, 33, 257, 258]);
        assert_eq!(tokenizer.decode(&encoded).unwrap(), "hello hello");
        assert_eq!(tokenizer.encode("").unwrap(), [0]);
        assert_eq!(tokenizer.encode_more("hello").unwrap(), [257, 258]);
    }

    #[test]
    fn characters_come_whole() {
        assert_eq!(
            stream(&[], &ids("aé€😀b".as_bytes())).0,
            ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
        );
    }

    #[test]
    fn broken_characters_are_replaced_and_do_not_stall() {
        let bytes = [0xe2, 0x82, b'a', 0x80, 0x80, b'b', 0xf0, 0x9f];
        let (pieces, _) = stream(&[], &ids(&bytes));
        assert_eq!(
            pieces,
            [
                "",
                "",
                "\u{fffd}a",
                "",
                "\u{fffd}",
                "\u{fffd}b",
                "",
                "",
                "\u{fffd}"
            ]
        );
        assert_eq!(pieces.concat(), String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn special_tokens_have_no_text() {
        assert_eq!(stream(&[], &[257, 0, 258, 0]).0, ["he", "", "llo", "", ""]);
    }

    #[test]
    fn stop_strings_span_tokens_and_never_leak() {
        let (pieces, stopped) = stream(&["lloX"], &[257, 258, 89, 258]);
        assert_eq!(
            (pieces.as_slice(), stopped),
            (&["he", "", ""].map(str::to_owned)[..], true)
        );
        let (pieces, stopped) = stream(&["lloX"], &[257, 258, 90]);
        assert_eq!(pieces, ["he", "", "lloY", ""]);
        assert!(!stopped);
    }

    #[test]
    fn what_was_held_is_given_at_the_end() {
        let (pieces, stopped) = stream(&["llo\n\n"], &[257, 258, 11]);
        assert_eq!(pieces, ["he", "", "", "llo\n"]);
        assert!(!stopped);
    }

    #[test]
    fn the_earliest_stop_string_wins() {
        assert_eq!(
            stream(&["o", "e"], &[257, 258]),
            (vec!["h".to_owned()], true)
        );
        assert_eq!(stream(&["€"], &ids("a€b".as_bytes())).0.concat(), "a");
    }

    proptest::proptest! {
        #[test]
        fn streams_add_up_to_the_whole_text(
            ids in proptest::collection::vec(0u32..260, 0..40),
            stop in "[a-c]{1,3}",
        ) {
            let text = byte_tokenizer().decode(&ids).unwrap();
            proptest::prop_assert_eq!(stream(&[], &ids).0.concat(), &text[..]);
            let (pieces, stopped) = stream(&[&stop], &ids);
            let found = text.find(&stop);
            proptest::prop_assert_eq!(stopped, found.is_some());
            proptest::prop_assert_eq!(pieces.concat(), &text[..found.unwrap_or(text.len())]);
        }
    }
}
