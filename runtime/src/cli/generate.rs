//! `kiln generate`.

use super::interrupt;
use super::output::{Printed, Printer, TensorFile};
use super::requests::{self, Line};
use super::settings::{Settings, Wanted};
use super::{DeviceArgs, Loaded, describe, load, read_file};
use anyhow::{Context, bail};
use clap::ArgGroup;
use kiln_runtime::device::Observe;
use kiln_runtime::{Completion, Engine, Event, Prompt, Request, RequestError, RequestId};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `kiln generate`.
#[derive(clap::Args)]
#[command(group = ArgGroup::new("source").required(true))]
pub(super) struct GenerateArgs {
    /// Directory of the compiled bundle
    bundle: PathBuf,
    /// Text to continue
    #[arg(group = "source")]
    prompt: Option<String>,
    /// Reads the text to continue from a file, as it is; - is standard input
    #[arg(long, value_name = "FILE", group = "source")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue, as they are
    #[arg(long, value_name = "ID,...", value_delimiter = ',', group = "source")]
    prompt_ids: Option<Vec<u32>>,
    /// Requests to run together, one JSON object a line: "prompt" or "prompt_ids", and any of the
    /// generation options by its long name with underscores. Options of the command line hold where
    /// a line is silent; - is standard input
    #[arg(long, value_name = "FILE", group = "source")]
    input: Option<PathBuf>,

    #[command(flatten)]
    settings: Settings,

    /// Prints one JSON object a prompt and line, with ids, text, usage and timing
    #[arg(long)]
    json: bool,
    /// Writes f32 tensors logits.<request index> (positions, vocabulary): a row for each prompt
    /// token, then for each generated one, the last one included
    #[arg(long, value_name = "FILE")]
    output_logits: Option<PathBuf>,
    /// Writes f32 tensors hidden.<request index> (layers + 1, positions, hidden size): the embedding
    /// output, then each layer's; the positions are those of --output-logits
    #[arg(long, value_name = "FILE")]
    output_hidden_states: Option<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,
}

/// The tensors that were asked for.
struct Files {
    logits: Option<TensorFile>,
    hidden_states: Option<TensorFile>,
    vocab_size: usize,
    layers: usize,
    hidden_size: usize,
}

/// A request, and the place to name when it is refused.
struct Asked {
    place: String,
    request: Request,
    wanted: Wanted,
}

/// A request that runs.
struct Running {
    wanted: Wanted,
    /// The text before each of its results.
    echo: String,
    /// Generations that are not done.
    left: usize,
    /// Those that are, by their index; none for one that failed.
    done: Vec<Option<Completion>>,
}

pub(super) fn run(args: GenerateArgs) -> anyhow::Result<ExitCode> {
    let observe = Observe {
        logits: args.output_logits.is_some(),
        hidden_states: args.output_hidden_states.is_some(),
    };
    let requests = read_requests(&args, observe)?;
    if args.input.is_none()
        && let Some(error) = requests.iter().find_map(|asked| asked.check().err())
    {
        // These came from flags alone.
        eprintln!("error: {error}");
        return Ok(ExitCode::from(2));
    }
    interrupt::install()?;
    let Loaded {
        mut engine,
        bundle,
        load_time,
    } = load(&args.bundle, &args.device)?;
    if engine.tokenizer().is_none() && !args.json {
        eprintln!("note: this bundle has no tokenizer, so there is no text; --json prints ids");
    }
    let mut batch = Batch::default();
    for asked in requests {
        batch.submit(asked, &mut engine)?;
    }
    let model = &bundle.manifest().model;
    let mut files = Files {
        logits: args
            .output_logits
            .as_deref()
            .map(TensorFile::create)
            .transpose()?,
        hidden_states: args
            .output_hidden_states
            .as_deref()
            .map(TensorFile::create)
            .transpose()?,
        vocab_size: model.vocab_size as usize,
        layers: model.layers as usize,
        hidden_size: model.hidden_size as usize,
    };
    let mut printer = Printer::new(io::stdout().lock(), args.json, load_time);
    let failed = batch.generate(&mut engine, &mut printer, &mut files)?;
    if interrupt::interrupted() && !engine.is_idle() {
        let (done, all) = (printer.printed(), batch.running.len());
        eprintln!("interrupted: {done} of {all} prompts done");
        return Ok(interrupt::exit_code());
    }
    for file in [files.logits, files.hidden_states].into_iter().flatten() {
        file.finish()?;
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// The requests, in their order.
fn read_requests(args: &GenerateArgs, observe: Observe) -> anyhow::Result<Vec<Asked>> {
    let asked = |place: String, prompt: Prompt, settings: &Settings| Asked {
        place,
        request: settings.request(prompt, observe),
        wanted: settings.wanted(),
    };
    if let Some(path) = &args.input {
        let name = path.display();
        let lines = requests::parse(&read_file(path)?, &args.settings);
        let lines = lines.map_err(|problem| anyhow::anyhow!("{name}: {problem}"))?;
        if lines.is_empty() {
            bail!("{name} holds no requests");
        }
        let request = |line: Line| {
            let place = format!("{name}: line {}", line.number);
            asked(place, line.prompt, &line.settings)
        };
        return Ok(lines.into_iter().map(request).collect());
    }
    let (place, prompt) = if let Some(path) = &args.prompt_file {
        let name = path.display().to_string();
        let text = String::from_utf8(read_file(path)?).map_err(|error| {
            let offset = error.utf8_error().valid_up_to();
            let byte = error.as_bytes().get(offset).copied().unwrap_or_default();
            anyhow::anyhow!("{name} is not valid UTF-8: byte 0x{byte:02x} at offset {offset}")
        })?;
        (name, Prompt::Text(text))
    } else if let Some(ids) = &args.prompt_ids {
        ("--prompt-ids".to_owned(), Prompt::Ids(ids.clone()))
    } else {
        (
            "prompt".to_owned(),
            Prompt::Text(args.prompt.clone().unwrap_or_default()),
        )
    };
    Ok(vec![asked(place, prompt, &args.settings)])
}

impl Asked {
    fn check(&self) -> Result<(), RequestError> {
        self.request.check()?;
        self.wanted.choices.check(&self.request)
    }
}

/// The requests that run together.
#[derive(Default)]
struct Batch {
    running: Vec<Running>,
    /// Index of the request, and of the generation in it.
    owners: HashMap<RequestId, (usize, usize)>,
}

impl Batch {
    fn submit(&mut self, asked: Asked, engine: &mut Engine) -> anyhow::Result<()> {
        asked.check().with_context(|| asked.place.clone())?;
        let Asked {
            place,
            request,
            wanted,
        } = asked;
        let generations = wanted.choices.requests(&request);
        let left = generations.len();
        for (index, generation) in generations.into_iter().enumerate() {
            let id = engine.submit(generation).with_context(|| place.clone())?;
            self.owners.insert(id, (self.running.len(), index));
        }
        let echo = match (wanted.echo, request.prompt, engine.tokenizer()) {
            (true, Prompt::Text(text), _) => text,
            (true, Prompt::Ids(ids), Some(tokenizer)) => tokenizer.decode(&ids)?,
            _ => String::new(),
        };
        self.running.push(Running {
            wanted,
            echo,
            left,
            done: vec![None; left],
        });
        Ok(())
    }

    /// Runs the requests until all are done or Ctrl-C is pressed. Returns whether one of them failed.
    fn generate(
        &mut self,
        engine: &mut Engine,
        printer: &mut Printer<io::StdoutLock<'_>>,
        files: &mut Files,
    ) -> anyhow::Result<bool> {
        let mut failed = false;
        for (index, running) in self.running.iter().enumerate() {
            if running.streams() {
                printer.text(index, &running.echo)?;
            }
        }
        while !engine.is_idle() {
            if interrupt::interrupted() {
                printer.interrupted()?;
                break;
            }
            for event in engine.step()? {
                match event {
                    Event::Token(token) => {
                        let index = self.owner(token.request).0;
                        if self.running.get(index).is_some_and(Running::streams) {
                            printer.text(index, &token.text)?;
                        }
                    }
                    Event::Finished(completion) => {
                        let owner = self.owner(completion.request);
                        self.end(owner, Some(*completion), engine, printer, files)?;
                    }
                    Event::Failed { request, error } => {
                        let owner = self.owner(request);
                        eprintln!("error: request {}: {}", owner.0, describe(&error.into()));
                        self.end(owner, None, engine, printer, files)?;
                        failed = true;
                    }
                }
            }
        }
        Ok(failed)
    }

    fn owner(&self, id: RequestId) -> (usize, usize) {
        self.owners.get(&id).copied().unwrap_or_default()
    }

    /// Takes note of a generation's end, and prints the request where it was the last.
    fn end(
        &mut self,
        (index, generation): (usize, usize),
        completion: Option<Completion>,
        engine: &Engine,
        printer: &mut Printer<io::StdoutLock<'_>>,
        files: &mut Files,
    ) -> anyhow::Result<()> {
        let Some(running) = self.running.get_mut(index) else {
            return Ok(());
        };
        running.left -= 1;
        if let Some(done) = running.done.get_mut(generation) {
            *done = completion;
        }
        if running.left > 0 {
            return Ok(());
        }
        let all = std::mem::take(&mut running.done).into_iter().flatten();
        let best = running.wanted.choices.best(all.collect());
        if best.is_empty() {
            printer.failed(index)?;
            return Ok(());
        }
        let result = Printed {
            choices: &best,
            logprobs: running.wanted.logprobs,
            echo: running.wanted.echo,
            echo_text: &running.echo,
            streamed: running.streams(),
        };
        printer.finished(index, &result, engine.tokenizer())?;
        for completion in best {
            files.take(index, completion);
        }
        Ok(())
    }
}

impl Running {
    /// Whether its text can be printed as it comes.
    fn streams(&self) -> bool {
        self.wanted.choices.generated == 1
    }
}

impl Files {
    fn take(&mut self, index: usize, completion: Completion) {
        if let Some(file) = &mut self.logits {
            let shape = [None, Some(self.vocab_size)];
            file.add(format!("logits.{index}"), &shape, completion.logits);
        }
        if let Some(file) = &mut self.hidden_states {
            let shape = [Some(self.layers + 1), None, Some(self.hidden_size)];
            file.add(format!("hidden.{index}"), &shape, completion.hidden_states);
        }
    }
}
