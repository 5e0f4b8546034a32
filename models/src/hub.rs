//! Downloads a model's files from the hub into the local cache.
//!
//! Endpoint, cache directory, its layout and the token are hf-hub's, so that the cache is shared
//! with the Python libraries. The transfer is our own, because hf-hub 0.5's neither survives a
//! finished partial file, nor checks that a resumed response starts where the partial file ends,
//! nor has timeouts, and asks for gzip together with ranges, which the hub answers without a range.
//!
//! Files are fetched at the commit that the branch pointed to at the start. What a commit holds
//! never changes, so a partial file can be resumed at any later time.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::{RepoInfo, sync::ApiBuilder},
};
use indicatif::{ProgressBar, ProgressStyle};
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{Response, StatusCode, header},
};

use crate::checkpoint::{CheckpointError, Found, WEIGHT_FILES, parse_index};

/// Files beside the weights; config.json must be there, the others are taken if they are.
const SIDE_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
];

const TIMEOUT_CONNECT: Duration = Duration::from_secs(20);
const TIMEOUT_READ: Duration = Duration::from_secs(60);
const INFO_LIMIT_BYTES: u64 = 32 << 20;
const INDEX_LIMIT_BYTES: u64 = 64 << 20;

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Not of the form owner/name: the caller's mistake.
    #[error("{model:?} is no hub id; needed: owner/name, of letters, digits, '.', '_' and '-'")]
    Name {
        /// What was given.
        model: String,
    },
    /// The hub cannot be reached and the cache does not hold the model.
    #[error(
        "cannot reach the hub at {endpoint} for {model} ({reason}) and {cache} does not hold the \
         whole model; check the connection, set HF_ENDPOINT to a mirror, or give a local directory"
    )]
    Offline {
        /// The model.
        model: String,
        /// The endpoint.
        endpoint: String,
        /// The cache directory.
        cache: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// The hub has no such repository or file.
    #[error(
        "the hub at {endpoint} has no {what} (HTTP 404); check the spelling of the model's name"
    )]
    NotFound {
        /// The endpoint.
        endpoint: String,
        /// The repository, or a file of it.
        what: String,
    },
    /// The repository is gated, private, or does not exist: the hub does not say which.
    #[error(
        "the hub at {endpoint} refuses access to {model} (HTTP {status}): it is gated, private or \
         misspelt; accept its terms on its page and set HF_TOKEN to a token that may read it"
    )]
    Denied {
        /// The endpoint.
        endpoint: String,
        /// The model.
        model: String,
        /// 401 or 403.
        status: u16,
    },
    /// The repository holds nothing that kiln can compile.
    #[error("{model} has no {needed}; found {found}; choose a repository of an OPT or GPT-2 model")]
    Files {
        /// The model.
        model: String,
        /// What is missing.
        needed: String,
        /// What is there.
        found: Found,
    },
    /// The hub answered what it should not: a mirror's or a proxy's mistake.
    #[error("{url}: found {found}; needed {needed}; try again, or another HF_ENDPOINT")]
    Response {
        /// The address.
        url: String,
        /// What came.
        found: String,
        /// What should have come.
        needed: String,
    },
    /// A transfer broke off; what came is kept.
    #[error(
        "{file} of {model}: the download broke off after {have} bytes ({reason}); run the same command again to resume it"
    )]
    Interrupted {
        /// The model.
        model: String,
        /// The file.
        file: String,
        /// Bytes that are kept.
        have: u64,
        /// What went wrong.
        reason: String,
    },
    /// The cache cannot be written.
    #[error("cannot write {path}: {source}; set HF_HOME to a directory with enough room")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The index of the shards is not usable.
    #[error(transparent)]
    Index(#[from] CheckpointError),
}

/// Downloads what kiln needs of `owner/name`, unless it is cached, and gives the directory that
/// holds it. The environment decides: HF_ENDPOINT, HF_HOME, HF_TOKEN.
pub fn resolve(model: &str, progress: bool) -> Result<PathBuf, HubError> {
    Hub::from_env().resolve(model, progress)
}

/// A hub and a local cache.
#[derive(Clone, Debug)]
pub struct Hub {
    endpoint: String,
    cache: Cache,
    token: Option<String>,
    agent: Agent,
}

impl Hub {
    /// As the environment says: HF_ENDPOINT, HF_HOME, HF_TOKEN or the token that the hub's own
    /// tools have stored.
    pub fn from_env() -> Hub {
        let set = |name| {
            std::env::var(name)
                .ok()
                .filter(|value: &String| !value.is_empty())
        };
        let cache = Cache::from_env();
        let token = set("HF_TOKEN").or_else(|| cache.token());
        Hub::build(set("HF_ENDPOINT"), cache, token)
    }

    /// A hub at an address, caching in a directory.
    pub fn new(endpoint: &str, cache: PathBuf, token: Option<String>) -> Hub {
        Hub::build(Some(endpoint.to_owned()), Cache::new(cache), token)
    }

    fn build(endpoint: Option<String>, cache: Cache, token: Option<String>) -> Hub {
        let endpoint = endpoint.or_else(public_endpoint).unwrap_or_default();
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            // Compressed bodies have no ranges.
            .accept_encoding("identity")
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(TIMEOUT_CONNECT))
            .timeout_recv_response(Some(TIMEOUT_READ))
            .timeout_per_read(Some(TIMEOUT_READ))
            .build();
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Hub {
            endpoint,
            cache,
            token,
            agent: config.into(),
        }
    }

    /// Downloads what kiln needs of `owner/name`, unless it is cached, and gives the directory that
    /// holds it. With `progress`, a bar on standard error.
    pub fn resolve(&self, model: &str, progress: bool) -> Result<PathBuf, HubError> {
        if !is_model_name(model) {
            return Err(HubError::Name {
                model: model.to_owned(),
            });
        }
        let info = match self.info(model) {
            Ok(info) => info,
            // What is there already needs no connection.
            Err(offline @ HubError::Offline { .. }) => {
                return self.cached(model).ok_or(offline);
            }
            Err(error) => return Err(error),
        };
        let names: BTreeSet<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
        let missing = |needed: &str| HubError::Files {
            model: model.to_owned(),
            needed: needed.to_owned(),
            found: Found(names.iter().map(|name| (*name).to_owned()).collect()),
        };
        if !names.contains("config.json") {
            return Err(missing("config.json"));
        }
        let Some(weights) = WEIGHT_FILES.into_iter().find(|name| names.contains(name)) else {
            return Err(missing(
                "weights (model.safetensors, pytorch_model.bin, or shards of them)",
            ));
        };

        let dir = self.cache.model(model.to_owned()).pointer_path(&info.sha);
        let fetch = |file: &str| self.fetch(model, &info.sha, &dir, file, progress);
        for file in SIDE_FILES.into_iter().filter(|file| names.contains(file)) {
            fetch(file)?;
        }
        fetch(weights)?;
        for shard in shards(&dir, weights)? {
            fetch(&shard)?;
        }
        self.cache
            .model(model.to_owned())
            .create_ref(&info.sha)
            .map_err(|source| HubError::Io {
                path: self.cache.path().clone(),
                source,
            })?;
        Ok(dir)
    }

    /// What the repository holds, and at which commit.
    fn info(&self, model: &str) -> Result<RepoInfo, HubError> {
        let path = Repo::model(model.to_owned()).api_url();
        let url = format!("{}/api/{path}", self.endpoint);
        let mut response = self
            .get(&url, 0)
            .map_err(|error| self.offline(model, &error))?;
        self.check_status(model, model, &url, response.status())?;
        let text = response
            .body_mut()
            .with_config()
            .limit(INFO_LIMIT_BYTES)
            .read_to_string()
            .map_err(|error| self.offline(model, &error))?;
        let bad = |found: String| HubError::Response {
            url: url.clone(),
            found,
            needed: "a description of the repository: its commit and its files".to_owned(),
        };
        let info: RepoInfo = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        // The commit becomes a directory's name.
        if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(bad(format!("the commit {:?}", info.sha)));
        }
        Ok(info)
    }

    /// The snapshot that the branch pointed to when it was last fetched, if nothing is missing.
    fn cached(&self, model: &str) -> Option<PathBuf> {
        let config = self.cache.model(model.to_owned()).get("config.json")?;
        let dir = config.parent()?;
        let weights = WEIGHT_FILES
            .into_iter()
            .find(|name| dir.join(name).exists())?;
        let whole = shards(dir, weights)
            .ok()?
            .iter()
            .all(|shard| dir.join(shard).exists());
        whole.then(|| dir.to_owned())
    }

    /// Brings one file into the snapshot directory, continuing a partial one.
    fn fetch(
        &self,
        model: &str,
        commit: &str,
        dir: &Path,
        file: &str,
        progress: bool,
    ) -> Result<(), HubError> {
        let path = dir.join(file);
        if path.exists() {
            return Ok(());
        }
        let part_path = dir.join(format!("{file}.part"));
        let io_error = |source| HubError::Io {
            path: part_path.clone(),
            source,
        };
        fs::create_dir_all(dir).map_err(io_error)?;
        let mut part = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&part_path)
            .map_err(io_error)?;
        lock(&part, &part_path).map_err(io_error)?;
        // Another process may have finished it while this one waited for the lock.
        if path.exists() {
            return Ok(());
        }

        let url = format!("{}/{model}/resolve/{commit}/{file}", self.endpoint);
        let have = part.metadata().map_err(io_error)?.len();
        let mut transfer = self.start(model, file, &url, have)?;
        if transfer.start != have {
            part.set_len(transfer.start).map_err(io_error)?;
        }
        let bar = bar(progress, file, transfer.total, transfer.start);
        let mut have = transfer.start;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let interrupted = |reason: String| HubError::Interrupted {
                model: model.to_owned(),
                file: file.to_owned(),
                have,
                reason,
            };
            let count = match transfer.body.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(interrupted(error.to_string())),
            };
            if count == 0 {
                match transfer.total {
                    Some(total) if total != have => {
                        return Err(interrupted(format!("the file has {total}")));
                    }
                    _ => break,
                }
            }
            part.write_all(&buffer[..count]).map_err(io_error)?;
            have += count as u64;
            bar.set_position(have);
        }
        bar.finish_and_clear();
        fs::rename(&part_path, &path).map_err(io_error)
    }

    /// Asks for a file from byte `have` on.
    fn start(&self, model: &str, file: &str, url: &str, have: u64) -> Result<Transfer, HubError> {
        let mut response = self
            .get(url, have)
            .map_err(|error| self.offline(model, &error))?;
        // The partial file is whole, or is not of this file at all: both are settled by its length.
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE && have > 0 {
            if content_range(&response).is_some_and(|(_, total)| total == Some(have)) {
                let body = Box::new(io::empty());
                return Ok(Transfer {
                    start: have,
                    total: Some(have),
                    body,
                });
            }
            response = self
                .get(url, 0)
                .map_err(|error| self.offline(model, &error))?;
        }
        self.check_status(model, &format!("{file} in {model}"), url, response.status())?;
        let (start, total) = if response.status() == StatusCode::PARTIAL_CONTENT {
            match content_range(&response) {
                Some((Some(start), total)) if start <= have => (start, total),
                _ => {
                    return Err(HubError::Response {
                        url: url.to_owned(),
                        found: "a partial response that does not start where it was asked to"
                            .to_owned(),
                        needed: format!("bytes from {have} on, with a Content-Range"),
                    });
                }
            }
        } else {
            // The server ignores ranges and starts over.
            let total = response
                .headers()
                .get(header::CONTENT_LENGTH)
                .and_then(|value| value.to_str().ok()?.parse().ok());
            (0, total)
        };
        let body = Box::new(response.into_body().into_reader());
        Ok(Transfer { start, total, body })
    }

    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, ureq::Error> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call()
    }

    fn check_status(
        &self,
        model: &str,
        what: &str,
        url: &str,
        status: StatusCode,
    ) -> Result<(), HubError> {
        let endpoint = self.endpoint.clone();
        match status.as_u16() {
            200..=299 => Ok(()),
            401 | 403 => {
                let status = status.as_u16();
                Err(HubError::Denied {
                    endpoint,
                    model: model.to_owned(),
                    status,
                })
            }
            404 => Err(HubError::NotFound {
                endpoint,
                what: what.to_owned(),
            }),
            _ => Err(HubError::Response {
                url: url.to_owned(),
                found: format!("HTTP {status}"),
                needed: "HTTP 200 or 206".to_owned(),
            }),
        }
    }

    fn offline(&self, model: &str, error: &ureq::Error) -> HubError {
        HubError::Offline {
            model: model.to_owned(),
            endpoint: self.endpoint.clone(),
            cache: self.cache.path().clone(),
            reason: error.to_string(),
        }
    }
}

/// A response's body and the place in the file that it starts at.
struct Transfer {
    start: u64,
    total: Option<u64>,
    body: Box<dyn Read>,
}

/// The endpoint that hf-hub goes to when none is set.
fn public_endpoint() -> Option<String> {
    // Nothing is read from this cache: the builder wants one.
    let api = ApiBuilder::from_cache(Cache::new(PathBuf::new()))
        .build()
        .ok()?;
    let probe = api
        .repo(Repo::new("a/b".to_owned(), RepoType::Model))
        .url("c");
    let (endpoint, _) = probe.split_once("/a/b/")?;
    Some(endpoint.to_owned())
}

/// owner/name, neither of which can mean a path.
fn is_model_name(model: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    model
        .split_once('/')
        .is_some_and(|(owner, name)| part(owner) && part(name))
}

/// The shards that a downloaded index names; none for a single weight file.
fn shards(dir: &Path, weights: &str) -> Result<BTreeSet<String>, HubError> {
    if !weights.ends_with(".index.json") {
        return Ok(BTreeSet::new());
    }
    let path = dir.join(weights);
    let mut text = String::new();
    File::open(&path)
        .and_then(|file| file.take(INDEX_LIMIT_BYTES).read_to_string(&mut text))
        .map_err(|source| HubError::Io {
            path: path.clone(),
            source,
        })?;
    Ok(parse_index(&text, &path)?.into_values().collect())
}

/// Start and total length that a Content-Range gives: `bytes 7-9/10` or `bytes */10`.
fn content_range(response: &Response<Body>) -> Option<(Option<u64>, Option<u64>)> {
    let value = response
        .headers()
        .get(header::CONTENT_RANGE)?
        .to_str()
        .ok()?;
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let start = range
        .split_once('-')
        .and_then(|(start, _)| start.parse().ok());
    Some((start, total.parse().ok()))
}

/// One process downloads a file at a time; another waits for it.
fn lock(part: &File, path: &Path) -> io::Result<()> {
    match part.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            eprintln!("waiting for another download of {}", path.display());
            part.lock()
        }
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn bar(shown: bool, file: &str, total: Option<u64>, start: u64) -> ProgressBar {
    if !shown {
        return ProgressBar::hidden();
    }
    let bar = match total {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::no_length(),
    };
    let template = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(file.to_owned());
    bar.set_position(start);
    // The rate is that of this transfer, not of the bytes that were there.
    bar.reset_eta();
    bar
}
