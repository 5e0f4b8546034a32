//! `kiln embed`: a vector for each text, from the model's hidden states.

use super::interrupt;
use super::output::{TensorFile, stdout_error};
use super::requests;
use super::settings::{Ids, ids};
use super::{DeviceArgs, Loaded, describe, load, read_file};
use anyhow::{Context, bail};
use clap::ArgGroup;
use kiln_runtime::{Completion, Embedding, Engine, Event, Pooling, Prompt, Request, RequestId};
use serde::Serialize;
use std::collections::HashMap;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `kiln embed`.
#[derive(clap::Args)]
#[command(group = ArgGroup::new("source").required(true))]
pub(super) struct EmbedArgs {
    /// Directory of the compiled bundle
    bundle: PathBuf,
    /// Texts
    #[arg(group = "source", value_name = "PROMPT")]
    prompts: Vec<String>,
    /// Token ids of a text, as they are; may be given several times
    #[arg(long, value_name = "ID,...", value_parser = ids, group = "source")]
    prompt_ids: Vec<Ids>,
    /// Texts to run together, one JSON object a line: "prompt" or "prompt_ids"; - is standard input
    #[arg(long, value_name = "FILE", group = "source")]
    input: Option<PathBuf>,

    /// How the hidden states of a text's tokens become one vector: their mean, or that of the last
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Pool::Mean)]
    pooling: Pool,
    /// Takes the hidden states behind this layer, before the final normalisation; 0 is the embedding
    /// output, before any attention [default: the last]
    #[arg(long, value_name = "N")]
    layer: Option<u32>,
    /// Scales each vector to length 1
    #[arg(long)]
    normalize: bool,

    /// Prints one JSON object a text and line: {"prompt_ids":[..],"embedding":[..]}. This is the
    /// default without --output
    #[arg(long)]
    json: bool,
    /// Writes the f32 tensor embeddings (texts, hidden size) to a safetensors file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,
}

/// [`Pooling`] as a flag.
#[derive(clap::ValueEnum, Clone, Copy)]
enum Pool {
    Mean,
    Last,
}

impl From<Pool> for Pooling {
    fn from(pool: Pool) -> Pooling {
        match pool {
            Pool::Mean => Pooling::Mean,
            Pool::Last => Pooling::Last,
        }
    }
}

/// A line of output.
#[derive(Serialize)]
struct Vector {
    prompt_ids: Vec<u32>,
    /// (C)
    embedding: Vec<f32>,
}

pub(super) fn run(args: &EmbedArgs) -> anyhow::Result<ExitCode> {
    let prompts = read_prompts(args)?;
    interrupt::install()?;
    let Loaded {
        mut engine, bundle, ..
    } = load(&args.bundle, &args.device)?;
    let mut indices = HashMap::new();
    for (index, (place, prompt)) in prompts.into_iter().enumerate() {
        let mut request = Request::new(prompt);
        request.max_new_tokens = Some(0);
        request.outputs.embedding = Some(Embedding {
            pooling: args.pooling.into(),
            layer: args.layer,
        });
        let id = engine.submit(request).with_context(|| place)?;
        indices.insert(id, index);
    }
    let file = args.output.as_deref().map(TensorFile::create).transpose()?;
    let Some(vectors) = embed(&mut engine, &indices, args.normalize)? else {
        eprintln!("interrupted: nothing is printed or written");
        return Ok(interrupt::exit_code());
    };
    if args.json || file.is_none() {
        let mut out = BufWriter::new(io::stdout().lock());
        for vector in &vectors {
            let line = serde_json::to_string(vector)?;
            writeln!(out, "{line}").map_err(stdout_error)?;
        }
        out.flush().map_err(stdout_error)?;
    }
    if let Some(mut file) = file {
        let width = bundle.manifest().model.hidden_size as usize;
        let rows = vectors.into_iter().flat_map(|vector| vector.embedding);
        file.add(
            "embeddings".to_owned(),
            &[None, Some(width)],
            rows.collect(),
        );
        file.finish()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The prompts in their order, each with the place to name when it is refused.
fn read_prompts(args: &EmbedArgs) -> anyhow::Result<Vec<(String, Prompt)>> {
    if let Some(path) = &args.input {
        let name = path.display();
        let lines = requests::parse_prompts(&read_file(path)?);
        let lines = lines.map_err(|problem| anyhow::anyhow!("{name}: {problem}"))?;
        if lines.is_empty() {
            bail!("{name} holds no requests");
        }
        let place = |(number, prompt)| (format!("{name}: line {number}"), prompt);
        return Ok(lines.into_iter().map(place).collect());
    }
    let texts = args.prompts.iter().map(|text| Prompt::Text(text.clone()));
    let ids = args
        .prompt_ids
        .iter()
        .map(|Ids(ids)| Prompt::Ids(ids.clone()));
    let number = |(number, prompt)| (format!("prompt {number}"), prompt);
    Ok((1..).zip(texts.chain(ids)).map(number).collect())
}

/// Runs the requests to their end. Returns the vectors in the order of the requests, or none when
/// Ctrl-C is pressed.
fn embed(
    engine: &mut Engine,
    indices: &HashMap<RequestId, usize>,
    normalize: bool,
) -> anyhow::Result<Option<Vec<Vector>>> {
    let number = |index: Option<&usize>| index.map_or(0, |index| index + 1);
    let mut done = Vec::with_capacity(indices.len());
    while !engine.is_idle() {
        if interrupt::interrupted() {
            return Ok(None);
        }
        for event in engine.step()? {
            match event {
                Event::Token(_) => {}
                Event::Finished(completion) => {
                    let index = indices.get(&completion.request);
                    if !completion.embedding.iter().all(|value| value.is_finite()) {
                        bail!(
                            "prompt {}: its vector holds a value that is no finite number: the \
                             weights are damaged or overflow",
                            number(index)
                        );
                    }
                    done.push((index, vector(*completion, normalize)));
                }
                Event::Failed { request, error } => {
                    let number = number(indices.get(&request));
                    bail!("prompt {number}: {}", describe(&error.into()));
                }
            }
        }
    }
    done.sort_by_key(|(index, _)| *index);
    Ok(Some(done.into_iter().map(|(_, vector)| vector).collect()))
}

fn vector(completion: Completion, normalize: bool) -> Vector {
    let mut embedding = completion.embedding;
    if normalize {
        scale_to_length_1(&mut embedding);
    }
    Vector {
        prompt_ids: completion.prompt_ids,
        embedding,
    }
}

/// A vector of zeros has no direction and stays.
fn scale_to_length_1(vector: &mut [f32]) {
    let squares = vector.iter().map(|&x| f64::from(x) * f64::from(x));
    let length = squares.sum::<f64>().sqrt();
    if length > 0.0 {
        for x in vector {
            *x = (f64::from(*x) / length) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_scaled() {
        let mut vector = [3.0, 0.0, -4.0];
        scale_to_length_1(&mut vector);
        assert_eq!(vector, [0.6, 0.0, -0.8]);
        // The squares are beyond f32.
        let mut large = [1e30, 1e30];
        scale_to_length_1(&mut large);
        assert!((large[0] - 0.5f32.sqrt()).abs() < 1e-6, "{large:?}");
        let mut zero = [0.0; 3];
        scale_to_length_1(&mut zero);
        assert_eq!(zero, [0.0; 3]);
    }
}
