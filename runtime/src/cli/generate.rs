//! `kiln generate`.

use super::interrupt;
use super::output::{Printer, TensorFile};
use super::requests::{self, Line};
use super::settings::Settings;
use super::{DeviceArgs, Loaded, describe, load, read_file};
use anyhow::{Context, bail};
use clap::ArgGroup;
use kiln_runtime::device::Observe;
use kiln_runtime::{Completion, Engine, Event, Prompt, Request, RequestId};
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

pub(super) fn run(args: GenerateArgs) -> anyhow::Result<ExitCode> {
    let observe = Observe {
        logits: args.output_logits.is_some(),
        hidden_states: args.output_hidden_states.is_some(),
    };
    let requests = read_requests(&args, observe)?;
    interrupt::install()?;
    let Loaded {
        mut engine,
        bundle,
        load_time,
    } = load(&args.bundle, &args.device)?;
    if engine.tokenizer().is_none() && !args.json {
        eprintln!("note: this bundle has no tokenizer, so there is no text; --json prints ids");
    }
    let mut ids = Vec::new();
    for (place, request) in requests {
        ids.push(engine.submit(request).with_context(|| place)?);
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
    let failed = generate(&mut engine, &ids, &mut printer, &mut files)?;
    if interrupt::interrupted() && !engine.is_idle() {
        let (done, all) = (printer.printed(), ids.len());
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

/// The requests, each with the place to name when it is refused.
fn read_requests(args: &GenerateArgs, observe: Observe) -> anyhow::Result<Vec<(String, Request)>> {
    if let Some(path) = &args.input {
        let name = path.display();
        let lines = requests::parse(&read_file(path)?, &args.settings);
        let lines = lines.map_err(|problem| anyhow::anyhow!("{name}: {problem}"))?;
        if lines.is_empty() {
            bail!("{name} holds no requests");
        }
        let request = |Line {
                           number,
                           prompt,
                           settings,
                       }: Line| {
            (
                format!("{name}: line {number}"),
                settings.request(prompt, observe),
            )
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
    Ok(vec![(place, args.settings.request(prompt, observe))])
}

/// Runs the requests until all are done or Ctrl-C is pressed. Returns whether one of them failed.
fn generate(
    engine: &mut Engine,
    ids: &[RequestId],
    printer: &mut Printer<io::StdoutLock<'_>>,
    files: &mut Files,
) -> anyhow::Result<bool> {
    let mut failed = false;
    let index_of = |id| ids.binary_search(&id).unwrap_or_default();
    while !engine.is_idle() {
        if interrupt::interrupted() {
            printer.interrupted()?;
            break;
        }
        for event in engine.step()? {
            match event {
                Event::Token(token) => printer.token(index_of(token.request), &token)?,
                Event::Finished(completion) => {
                    let index = index_of(completion.request);
                    printer.finished(index, &completion)?;
                    files.take(index, *completion);
                }
                Event::Failed { request, error } => {
                    let index = index_of(request);
                    eprintln!("error: request {index}: {}", describe(&error.into()));
                    printer.failed(index)?;
                    failed = true;
                }
            }
        }
    }
    Ok(failed)
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
