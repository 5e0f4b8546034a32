//! A text that a user and a model write in turn.
//!
//! It is kept as token ids, and each turn appends its own. Tokenizing the whole text again would join
//! letters across the border of two turns into other tokens: everything from there on would have to be
//! computed again, and what the model wrote would no longer be what it chose. Appended ids leave all
//! before them as it was, so the engine finds their keys and values in its cache.

use crate::completion::{Completion, FinishReason};
use crate::request::{DEFAULT_MAX_NEW_TOKENS, Prompt, Request, RequestError, parameter};
use crate::tokenizer::{Tokenizer, TokenizerError};
use kiln_bundle::Manifest;

/// The turns so far, each of which is what a user adds and what the model makes of it.
///
/// ```
/// # use kiln_bundle::Bundle;
/// # use kiln_runtime::{Completion, Conversation, Engine, Event, LoadOptions, Prompt, Request};
/// # use std::path::Path;
/// # fn finish(engine: &mut Engine) -> Result<Completion, Box<dyn std::error::Error>> {
/// #     loop {
/// #         for event in engine.step()? {
/// #             if let Event::Finished(completion) = event {
/// #                 return Ok(*completion);
/// #             }
/// #         }
/// #     }
/// # }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let bundle = Bundle::open(Path::new("examples/tiny.kiln"))?;
/// let mut engine = Engine::load(&bundle, &LoadOptions::default())?;
/// let mut conversation = Conversation::new(bundle.manifest());
/// for text in ["The sea was", " and"] {
///     let mut turn = Request::new(Prompt::Text(text.to_owned()));
///     turn.max_new_tokens = Some(8);
///     turn.ignore_eos = true;
///
///     let tokenizer = engine.tokenizer().ok_or("no tokenizer")?;
///     let request = conversation.request(turn, tokenizer)?;
///     engine.submit(request)?;
///     let before = conversation.ids().len();
///     let completion = finish(&mut engine)?; // steps until Event::Finished
///
///     // What was there before is not computed again, but for a last token that was never fed.
///     assert_eq!(completion.cached_tokens, before.saturating_sub(1));
///     let tokenizer = engine.tokenizer().ok_or("no tokenizer")?;
///     conversation.push(&completion, tokenizer)?;
/// }
/// let tokenizer = engine.tokenizer().ok_or("no tokenizer")?;
/// assert!(conversation.text(tokenizer)?.starts_with("The sea was"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Conversation {
    max_seq_len: usize,
    eos_token_ids: Vec<u32>,
    ids: Vec<u32>,
    /// Where each turn begins in `ids`.
    starts: Vec<usize>,
}

impl Conversation {
    /// An empty one for the model of a bundle.
    pub fn new(manifest: &Manifest) -> Conversation {
        Conversation {
            max_seq_len: manifest.limits.max_seq_len as usize,
            eos_token_ids: manifest.model.eos_token_ids.clone(),
            ids: Vec::new(),
            starts: Vec::new(),
        }
    }

    /// All of its tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// All of its text.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn text(&self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        tokenizer.decode(&self.ids)
    }

    /// Turns so far.
    pub fn turns(&self) -> usize {
        self.starts.len()
    }

    /// Whether the bundle's sequences hold no more tokens.
    pub fn is_full(&self) -> bool {
        self.ids.len() >= self.max_seq_len
    }

    /// Drops everything.
    pub fn reset(&mut self) {
        self.ids.clear();
        self.starts.clear();
    }

    /// Drops the last turn. Returns whether there was one.
    pub fn undo(&mut self) -> bool {
        let start = self.starts.pop();
        self.ids.truncate(start.unwrap_or(0));
        start.is_some()
    }

    /// The request for the next turn: `turn` with the conversation before its prompt, which may be
    /// empty, and with as many new tokens as there is room for. The conversation stays as it is until
    /// [`Conversation::push`].
    ///
    /// # Errors
    /// [`RequestError::EmptyPrompt`] with nothing to go on from, [`RequestError::PromptTooLong`] without
    /// room for another token, [`RequestError::Parameter`] for several results,
    /// [`RequestError::Tokenizer`].
    pub fn request(&self, turn: Request, tokenizer: &Tokenizer) -> Result<Request, RequestError> {
        if turn.choices.returned != 1 {
            let needed = "1 in a conversation, which goes on from one";
            let found = turn.choices.returned;
            return Err(parameter("num_return_sequences", found, needed));
        }
        let added = match &turn.prompt {
            Prompt::Ids(ids) => ids.clone(),
            Prompt::Text(text) if text.is_empty() => Vec::new(),
            // What a tokenizer puts around a text belongs before the first turn.
            Prompt::Text(text) if self.ids.is_empty() => tokenizer.encode(text)?,
            Prompt::Text(text) => tokenizer.encode_more(text)?,
        };
        let ids = [self.ids.as_slice(), &added].concat();
        if ids.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        let (found, limit) = (ids.len(), self.max_seq_len);
        if found >= limit {
            return Err(RequestError::PromptTooLong { found, limit });
        }
        let room = u32::try_from(limit - found).unwrap_or(u32::MAX);
        let asked = turn.max_new_tokens.unwrap_or(DEFAULT_MAX_NEW_TOKENS);
        Ok(Request {
            prompt: Prompt::Ids(ids),
            max_new_tokens: Some(asked.min(room)),
            ..turn
        })
    }

    /// Takes in what came of [`Conversation::request`], of a cancelled one too: what its text shows.
    ///
    /// # Errors
    /// [`TokenizerError`].
    pub fn push(
        &mut self,
        completion: &Completion,
        tokenizer: &Tokenizer,
    ) -> Result<(), TokenizerError> {
        let mut reply = Vec::new();
        if let Some(choice) = completion.choices.first() {
            reply.clone_from(&choice.ids);
            // The model's end of a text would have the next turn begin another one.
            let ended = choice.finish_reason == FinishReason::Stop;
            reply.pop_if(|id| ended && self.eos_token_ids.contains(id));
            reply = up_to(reply, &choice.text, tokenizer)?;
        }
        self.starts.push(self.ids.len());
        self.ids.clone_from(&completion.prompt_ids);
        self.ids.extend(reply);
        Ok(())
    }
}

/// Ids that have the text `text`, where those of `ids` begin with it: a stop string ends a text anywhere
/// in its tokens.
fn up_to(mut ids: Vec<u32>, text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>, TokenizerError> {
    loop {
        if let Some(rest) = text.strip_prefix(tokenizer.decode(&ids)?.as_str()) {
            ids.extend(tokenizer.encode_more(rest)?);
            return Ok(ids);
        }
        // The text of no ids is empty, and a prefix of any.
        ids.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::Choices;
    use crate::engine::{Engine, Event};
    use crate::testing::{EOS, FakeDevice, manifest};
    use crate::tokenizer::tests::byte_tokenizer;

    fn engine(manifest: &Manifest) -> Engine {
        let device = FakeDevice::new(manifest, 64, 1);
        Engine::new(Box::new(device), manifest, Some(byte_tokenizer())).unwrap()
    }

    /// A turn that only the model's end could end early, which is left out.
    fn turn(text: &str) -> Request {
        let mut turn = Request::new(Prompt::Text(text.to_owned()));
        turn.processors.suppress_tokens = (260..300).chain([EOS]).collect();
        turn.max_new_tokens = Some(10);
        turn
    }

    fn run(engine: &mut Engine, request: Request) -> Completion {
        engine.submit(request).unwrap();
        loop {
            for event in engine.step().unwrap() {
                if let Event::Finished(completion) = event {
                    return *completion;
                }
            }
        }
    }

    /// Says `text` and takes in the reply.
    fn say(conversation: &mut Conversation, engine: &mut Engine, turn: Request) -> Completion {
        let request = conversation.request(turn, &byte_tokenizer()).unwrap();
        let completion = run(engine, request);
        conversation.push(&completion, &byte_tokenizer()).unwrap();
        completion
    }

    #[test]
    fn turns_go_on_from_the_cache() {
        let manifest = manifest(64, 4, 200);
        let (mut engine, mut conversation) = (engine(&manifest), Conversation::new(&manifest));
        let first = say(&mut conversation, &mut engine, turn("hello hello hello"));
        assert_eq!(first.prompt_ids[0], EOS);
        let before = conversation.ids().to_vec();
        assert_eq!(before.len(), first.prompt_ids.len() + 10);
        let second = say(&mut conversation, &mut engine, turn("hello"));
        // The special token is not repeated, and nothing before the new text changes.
        assert_eq!(second.prompt_ids, [&before[..], &[257, 258]].concat());
        // The last token of the reply had not been fed.
        assert_eq!(second.cached_tokens, before.len() - 1);
        // Without anything new the model goes on.
        let third = say(&mut conversation, &mut engine, turn(""));
        assert_eq!(third.prompt_ids.len(), second.prompt_ids.len() + 10);
        assert_eq!(conversation.turns(), 3);
        // The whole text at once is continued in the same way.
        let mut whole = turn("");
        whole.prompt = Prompt::Ids(third.prompt_ids.clone());
        let alone = run(&mut super::tests::engine(&manifest), whole);
        assert_eq!(alone.choices, third.choices);
    }

    #[test]
    fn turns_are_dropped() {
        let manifest = manifest(64, 4, 200);
        let (mut engine, mut conversation) = (engine(&manifest), Conversation::new(&manifest));
        assert!(!conversation.undo());
        say(&mut conversation, &mut engine, turn("hello"));
        let first = conversation.clone();
        let second = say(&mut conversation, &mut engine, turn(" you"));
        assert!(conversation.undo());
        assert_eq!(conversation.ids(), first.ids());
        // The same again is the same again.
        let again = say(&mut conversation, &mut engine, turn(" you"));
        assert_eq!(again.choices, second.choices);
        conversation.reset();
        assert_eq!((conversation.turns(), conversation.ids()), (0, &[][..]));
        let anew = conversation.request(turn("hello"), &byte_tokenizer());
        assert_eq!(anew.unwrap().prompt, Prompt::Ids(vec![EOS, 257, 258]));
    }

    #[test]
    fn what_is_kept_is_what_was_shown() {
        let manifest = manifest(64, 4, 200);
        let (mut engine, tokenizer) = (engine(&manifest), byte_tokenizer());
        let whole = run(&mut engine, turn("hello"));
        let shown = |turn: Request, engine: &mut Engine| {
            let mut conversation = Conversation::new(&manifest);
            let found = say(&mut conversation, engine, turn);
            let text = conversation.text(&tokenizer).unwrap();
            assert_eq!(text, format!("hello{}", found.choices[0].text));
            (found, conversation)
        };
        // A stop string that ends within the reply.
        let (ids, text) = (&whole.choices[0].ids, &whole.choices[0].text);
        let (middle, character) = text.char_indices().nth(4).unwrap();
        let mut stopped = turn("hello");
        stopped.stop = vec![character.to_string()];
        let (found, conversation) = shown(stopped, &mut engine);
        assert_eq!(found.choices[0].finish_reason, FinishReason::Stop);
        assert!(found.choices[0].text.len() <= middle);
        assert!(conversation.ids().len() < 3 + found.choices[0].ids.len());
        // The model's end, which is fed to it as a bias here.
        let mut ended = turn("hello");
        ended.processors.suppress_tokens.pop();
        ended.processors.forced_eos_token_id = Some(EOS);
        let (found, conversation) = shown(ended, &mut engine);
        assert_eq!(found.choices[0].ids.last(), Some(&EOS));
        assert_eq!(conversation.ids()[3..], ids[..9]);
        // A cancelled turn.
        let mut conversation = Conversation::new(&manifest);
        let request = conversation.request(turn("hello"), &tokenizer).unwrap();
        let id = engine.submit(request).unwrap();
        for _ in 0..4 {
            engine.step().unwrap();
        }
        let cancelled = engine.cancel(id).unwrap();
        conversation.push(&cancelled, &tokenizer).unwrap();
        let kept = cancelled.choices[0].ids.len();
        assert!((1..10).contains(&kept));
        assert_eq!(conversation.ids()[3..], ids[..kept]);
    }

    #[test]
    fn room_runs_out() {
        let manifest = manifest(64, 4, 32);
        let (mut engine, mut conversation) = (engine(&manifest), Conversation::new(&manifest));
        // No more than there is room for, whatever is asked.
        let mut long = turn("hello hello");
        long.max_new_tokens = None;
        let found = say(&mut conversation, &mut engine, long);
        assert_eq!(found.choices[0].ids.len(), 32 - 6);
        assert!(conversation.is_full());
        for text in ["", "hello"] {
            let error = conversation.request(turn(text), &byte_tokenizer());
            let error = error.unwrap_err();
            assert!(
                matches!(error, RequestError::PromptTooLong { limit: 32, .. }),
                "{error}"
            );
        }
        assert!(conversation.undo() && !conversation.is_full());
        let empty = conversation.request(turn(""), &byte_tokenizer());
        assert!(matches!(empty.unwrap_err(), RequestError::EmptyPrompt));
        let mut several = turn("hello");
        several.choices = Choices {
            returned: 2,
            generated: 2,
        };
        let error = conversation.request(several, &byte_tokenizer());
        assert_eq!(
            error.unwrap_err().to_string(),
            "num_return_sequences is 2; it must be 1 in a conversation, which goes on from one"
        );
    }
}
