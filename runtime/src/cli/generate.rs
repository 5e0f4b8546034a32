//! `kiln generate`.

use super::output::{Printed, Printer, TensorFile};
use super::requests::{self, Line};
use super::settings::Settings;
use super::{DeviceArgs, Loaded, describe, load, read_file};
use super::{interactive, interrupt};
use anyhow::{Context, bail};
use clap::ArgGroup;
use kiln_bundle::{WholeFile, trace::Trace};
use kiln_runtime::{
    Completion, Engine, Event, Layers, Outputs, Prompt, Request, RequestId, STREAM,
};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Arguments of `kiln generate`.
#[derive(clap::Args)]
#[command(
    group = ArgGroup::new("source"),
    group = ArgGroup::new("start").required(true).multiple(true)
        .args(["prompt", "prompt_file", "prompt_ids", "input", "interactive"])
)]
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
    /// Goes on with lines that you type, in turn with the model; a prompt given besides is the first.
    /// Type /help for more. KILN_HISTORY is the file of what was typed, off for none
    /// [default: ~/.local/state/kiln/history]
    #[arg(long, conflicts_with_all = ["input", "json", "output_logits", "output_hidden_states",
          "output_scores", "num_return_sequences", "trace"])]
    interactive: bool,

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
    /// Of the hidden states, those of these layers alone, in this order; 0 is the embedding output
    #[arg(
        long,
        value_name = "LAYER,...",
        value_delimiter = ',',
        requires = "output_hidden_states"
    )]
    hidden_layers: Option<Vec<u32>>,
    /// Writes f32 tensors scores.<request index> (new tokens, vocabulary): what each token was chosen by,
    /// the logits as penalties and biases left them, and where it was sampled over the temperature and
    /// with -inf for what was cut
    #[arg(long, value_name = "FILE")]
    output_scores: Option<PathBuf>,
    /// Writes what ran when: loading, each step and its parts on the host, and its kernels where the
    /// device tells their times. Chrome trace JSON, for chrome://tracing and ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,
}

/// The tensors that were asked for.
struct Files {
    logits: Option<TensorFile>,
    scores: Option<TensorFile>,
    hidden_states: Option<TensorFile>,
    vocab_size: usize,
    /// Of which hidden states are written.
    layers: usize,
    hidden_size: usize,
}

/// A request, and the place to name when it is refused.
struct Asked {
    place: String,
    request: Request,
}

/// A request that runs.
struct Running {
    echo: bool,
    /// The text before each of its results, where they are echoed.
    echo_text: String,
    /// Whether its text is printed as it comes.
    streams: bool,
}

pub(super) fn run(args: GenerateArgs) -> anyhow::Result<ExitCode> {
    let requests = read_requests(&args)?;
    if args.input.is_none() {
        // These came from flags alone; a conversation may have none yet.
        let turn = args.settings.request(Prompt::Ids(Vec::new()));
        let request = requests.first().map_or(&turn, |asked| &asked.request);
        if let Err(error) = request.check() {
            eprintln!("error: {error}");
            return Ok(ExitCode::from(2));
        }
    }
    interrupt::install()?;
    if args.interactive {
        let first = requests
            .into_iter()
            .next()
            .map(|asked| asked.request.prompt);
        return interactive::run(first, args.settings, load(&args.bundle, &args.device)?);
    }
    let began = Instant::now();
    let trace_file = args.trace.as_deref().map(WholeFile::create).transpose()?;
    let trace = trace_file.is_some().then(Trace::new);
    let Loaded {
        mut engine,
        bundle,
        load_time,
    } = load(&args.bundle, &args.device)?;
    if let Some(trace) = trace {
        engine.record(trace, bundle.manifest());
        engine.note("load", began);
    }
    if engine.tokenizer().is_none() && !args.json {
        eprintln!("note: this bundle has no tokenizer, so there is no text; --json prints ids");
    }
    let mut batch = Batch::default();
    let began = Instant::now();
    for asked in requests {
        batch.submit(asked, &mut engine)?;
    }
    engine.note("tokenise", began);
    let model = &bundle.manifest().model;
    let file = |path: &Option<PathBuf>| path.as_deref().map(TensorFile::create).transpose();
    let mut files = Files {
        logits: file(&args.output_logits)?,
        scores: file(&args.output_scores)?,
        hidden_states: file(&args.output_hidden_states)?,
        vocab_size: model.vocab_size as usize,
        layers: match &args.hidden_layers {
            Some(layers) => layers.len(),
            None => model.layers as usize + 1,
        },
        hidden_size: model.hidden_size as usize,
    };
    let mut printer = Printer::new(io::stdout().lock(), args.json, load_time);
    let failed = batch.generate(&mut engine, &mut printer, &mut files)?;
    if let Some((file, trace)) = trace_file.zip(engine.take_trace()) {
        file.finish(|to| trace.write("kiln generate", to))?;
    }
    if interrupt::interrupted() && !engine.is_idle() {
        let (done, all) = (printer.printed(), batch.running.len());
        eprintln!("interrupted: {done} of {all} prompts done");
        return Ok(interrupt::exit_code());
    }
    let all = [files.logits, files.scores, files.hidden_states];
    all.into_iter().flatten().try_for_each(TensorFile::finish)?;
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// The requests, in their order.
fn read_requests(args: &GenerateArgs) -> anyhow::Result<Vec<Asked>> {
    let outputs = Outputs {
        logits: args.output_logits.is_some(),
        scores: args.output_scores.is_some(),
        hidden_states: match (&args.output_hidden_states, &args.hidden_layers) {
            (None, _) => Layers::None,
            (Some(_), None) => Layers::All,
            (Some(_), Some(layers)) => Layers::Of(layers.clone()),
        },
        embedding: None,
    };
    let asked = |place: String, prompt: Prompt, settings: &Settings| Asked {
        place,
        request: Request {
            outputs: outputs.clone(),
            ..settings.request(prompt)
        },
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
    } else if let Some(text) = &args.prompt {
        ("prompt".to_owned(), Prompt::Text(text.clone()))
    } else {
        // --interactive
        return Ok(Vec::new());
    };
    Ok(vec![asked(place, prompt, &args.settings)])
}

/// The requests that run together.
#[derive(Default)]
struct Batch {
    running: Vec<Running>,
    /// Index of the request.
    indices: HashMap<RequestId, usize>,
}

impl Batch {
    fn submit(&mut self, asked: Asked, engine: &mut Engine) -> anyhow::Result<()> {
        let Asked { place, request } = asked;
        let echo_text = match (request.echo, &request.prompt, engine.tokenizer()) {
            (true, Prompt::Text(text), _) => text.clone(),
            (true, Prompt::Ids(ids), Some(tokenizer)) => tokenizer.decode(ids)?,
            _ => String::new(),
        };
        let running = Running {
            echo: request.echo,
            echo_text,
            streams: request.choices.generated == 1 && request.beams.is_none(),
        };
        let id = engine.submit(request).with_context(|| place)?;
        self.indices.insert(id, self.running.len());
        self.running.push(running);
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
            if running.streams {
                printer.text(index, &running.echo_text)?;
            }
        }
        while !engine.is_idle() {
            if interrupt::interrupted() {
                printer.interrupted()?;
                break;
            }
            let events = engine.step()?;
            let began = Instant::now();
            for event in events {
                match event {
                    Event::Token(token) => {
                        let index = self.index(token.request);
                        if self
                            .running
                            .get(index)
                            .is_some_and(|running| running.streams)
                        {
                            printer.text(index, &token.text)?;
                        }
                    }
                    Event::Finished(completion) => {
                        let index = self.index(completion.request);
                        if let Some(running) = self.running.get(index) {
                            let printed = Printed {
                                completion: &completion,
                                echo: running.echo,
                                echo_text: &running.echo_text,
                                streamed: running.streams,
                            };
                            printer.finished(index, &printed, engine.tokenizer())?;
                        }
                        files.take(index, *completion);
                    }
                    Event::Failed { request, error } => {
                        let index = self.index(request);
                        eprintln!("error: request {index}: {}", describe(&error.into()));
                        printer.failed(index)?;
                        failed = true;
                    }
                }
            }
            engine.note(STREAM, began);
        }
        Ok(failed)
    }

    fn index(&self, id: RequestId) -> usize {
        self.indices.get(&id).copied().unwrap_or_default()
    }
}

impl Files {
    fn take(&mut self, index: usize, completion: Completion) {
        // Requests of which tensors are written have one.
        let Some(choice) = completion.choices.into_iter().next() else {
            return;
        };
        let rows = [None, Some(self.vocab_size)];
        if let Some(file) = &mut self.logits {
            file.add(format!("logits.{index}"), &rows, choice.logits);
        }
        if let Some(file) = &mut self.scores {
            file.add(format!("scores.{index}"), &rows, choice.scores);
        }
        if let Some(file) = &mut self.hidden_states {
            let shape = [Some(self.layers), None, Some(self.hidden_size)];
            file.add(format!("hidden.{index}"), &shape, choice.hidden_states);
        }
    }
}
