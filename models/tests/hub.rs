//! Downloads, from a small HTTP server on loopback.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use kiln_models::hub::Hub;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server misbehaves.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Hangs up in the middle of the first response for weights.
    DropsOnce,
    /// Answers ranged requests with the whole file.
    IgnoresRanges,
    /// Answers every request with this status.
    Status(u16),
    /// A commit that is no plain name.
    BadCommit,
}

struct Server {
    endpoint: String,
    /// Path and Range of every request, in order.
    log: Arc<Mutex<Vec<String>>>,
}

struct Repository {
    files: BTreeMap<&'static str, Vec<u8>>,
    fault: Mutex<Fault>,
    log: Arc<Mutex<Vec<String>>>,
}

fn serve(files: &[(&'static str, &[u8])], fault: Fault) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let log = Arc::default();
    let repository = Repository {
        files: files
            .iter()
            .map(|(name, bytes)| (*name, bytes.to_vec()))
            .collect(),
        fault: Mutex::new(fault),
        log: Arc::clone(&log),
    };
    thread::spawn(move || {
        for stream in listener.incoming() {
            // A client that hangs up is the test's own doing.
            let _ = answer(stream.unwrap(), &repository);
        }
    });
    Server { endpoint, log }
}

fn answer(mut stream: TcpStream, repository: &Repository) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut authorised) = (None, false);
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("range: bytes=") {
            range = value.trim_end_matches('-').parse::<usize>().ok();
        }
        authorised |= line == "authorization: bearer secret";
    }
    let fault = *repository.fault.lock().unwrap();
    let from = range.map_or(String::new(), |from| format!(" from {from}"));
    repository.log.lock().unwrap().push(format!("{path}{from}"));

    let mut respond = |status: &str, headers: &str, body: &[u8], len: usize| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {len}\r\nConnection: close\r\n{headers}\r\n"
        )?;
        stream.write_all(body)
    };
    if let Fault::Status(status) = fault {
        return respond(&format!("{status} Because"), "", b"", 0);
    }
    if path == "/api/models/owner/private/revision/main" && !authorised {
        return respond("401 Unauthorized", "", b"", 0);
    }
    if path.starts_with("/api/models/owner/") && path.ends_with("/revision/main") {
        let siblings: Vec<_> = repository
            .files
            .keys()
            .map(|name| serde_json::json!({ "rfilename": name }))
            .collect();
        let sha = if fault == Fault::BadCommit {
            "../../x"
        } else {
            COMMIT
        };
        let body = serde_json::json!({ "sha": sha, "siblings": siblings }).to_string();
        return respond("200 OK", "", body.as_bytes(), body.len());
    }
    let file = path
        .split_once(&format!("/resolve/{COMMIT}/"))
        .and_then(|(_, name)| repository.files.get_key_value(name));
    let Some((name, bytes)) = file else {
        return respond("404 Not Found", "", b"", 0);
    };
    let total = bytes.len();
    match range.filter(|_| fault != Fault::IgnoresRanges) {
        Some(from) if from >= total => respond(
            "416 No",
            &format!("Content-Range: bytes */{total}\r\n"),
            b"",
            0,
        ),
        Some(from) => {
            let header = format!("Content-Range: bytes {from}-{}/{total}\r\n", total - 1);
            respond("206 Partial Content", &header, &bytes[from..], total - from)
        }
        None if fault == Fault::DropsOnce && name.contains(".safetensors") => {
            *repository.fault.lock().unwrap() = Fault::None;
            respond("200 OK", "", &bytes[..total / 2], total)
        }
        None => respond("200 OK", "", bytes, total),
    }
}

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect()
}

fn hub(server: &Server, cache: &Path) -> Hub {
    Hub::new(&server.endpoint, cache.to_owned(), None)
}

#[track_caller]
fn refused(server: &Server, cache: &Path, model: &str, message: &str) {
    let error = hub(server, cache)
        .resolve(model, false)
        .unwrap_err()
        .to_string();
    let error = error.replace(&server.endpoint, "HUB");
    let error = error.replace(&cache.display().to_string(), "CACHE");
    assert_eq!(error, message);
}

#[test]
fn what_is_needed_is_downloaded_once() {
    let files = [
        ("config.json", &b"{}"[..]),
        ("merges.txt", b"m"),
        ("vocab.json", b"v"),
        ("model.safetensors", &weights()),
        ("pytorch_model.bin", b"not needed"),
        ("README.md", b"not needed"),
    ];
    let server = serve(&files, Fault::None);
    let cache = tempfile::tempdir().unwrap();
    let dir = hub(&server, cache.path())
        .resolve("owner/name", false)
        .unwrap();

    assert_eq!(
        dir,
        cache
            .path()
            .join("models--owner--name/snapshots")
            .join(COMMIT)
    );
    let mut names: Vec<_> = dir
        .read_dir()
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "config.json",
            "merges.txt",
            "model.safetensors",
            "vocab.json"
        ]
    );
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    let main = cache.path().join("models--owner--name/refs/main");
    assert_eq!(fs::read_to_string(main).unwrap(), COMMIT);

    server.log.lock().unwrap().clear();
    assert_eq!(
        hub(&server, cache.path())
            .resolve("owner/name", false)
            .unwrap(),
        dir
    );
    assert_eq!(
        *server.log.lock().unwrap(),
        ["/api/models/owner/name/revision/main"]
    );

    // Without the hub the cache serves.
    let gone = Server {
        endpoint: "http://127.0.0.1:1".to_owned(),
        log: Arc::default(),
    };
    assert_eq!(
        hub(&gone, cache.path())
            .resolve("owner/name", false)
            .unwrap(),
        dir
    );
}

#[test]
fn shards_are_downloaded_by_their_index() {
    let index = br#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#;
    let files = [
        ("config.json", &b"{}"[..]),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b"two"),
        ("model-3.safetensors", b"not needed"),
    ];
    let server = serve(&files, Fault::None);
    let cache = tempfile::tempdir().unwrap();
    let dir = hub(&server, cache.path())
        .resolve("owner/name", false)
        .unwrap();
    assert_eq!(fs::read(dir.join("model-2.safetensors")).unwrap(), b"two");
    assert!(!dir.join("model-3.safetensors").exists());
}

#[test]
fn an_index_cannot_reach_outside() {
    let index = br#"{"weight_map":{"a":"../../x.safetensors"}}"#;
    let files = [
        ("config.json", &b"{}"[..]),
        ("model.safetensors.index.json", index),
    ];
    let server = serve(&files, Fault::None);
    let cache = tempfile::tempdir().unwrap();
    let error = hub(&server, cache.path())
        .resolve("owner/name", false)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("names the shard \"../../x.safetensors\"; needed: a plain"),
        "{error}"
    );

    let server = serve(&files, Fault::BadCommit);
    refused(
        &server,
        cache.path(),
        "owner/name",
        "HUB/api/models/owner/name/revision/main: found the commit \"../../x\"; needed a \
         description of the repository: its commit and its files; try again, or another HF_ENDPOINT",
    );
}

#[test]
fn an_interrupted_download_is_resumed() {
    let files = [
        ("config.json", &b"{}"[..]),
        ("model.safetensors", &weights()),
    ];
    let server = serve(&files, Fault::DropsOnce);
    let cache = tempfile::tempdir().unwrap();
    let error = hub(&server, cache.path())
        .resolve("owner/name", false)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with(
            "model.safetensors of owner/name: the download broke off after 150000 bytes ("
        ) && error.ends_with("; run the same command again to resume it"),
        "{error}"
    );
    let dir = hub(&server, cache.path())
        .resolve("owner/name", false)
        .unwrap();
    let request = format!("/owner/name/resolve/{COMMIT}/model.safetensors from 150000");
    assert_eq!(server.log.lock().unwrap().last(), Some(&request));
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    assert!(!dir.join("model.safetensors.part").exists());
}

/// Partial files that a plain append would spoil.
#[test]
fn partial_files_are_never_spoilt() {
    let files = [
        ("config.json", &b"{}"[..]),
        ("model.safetensors", &weights()),
    ];
    let whole = weights();
    let cases = [
        (whole[..1000].to_vec(), Fault::IgnoresRanges),
        (whole.clone(), Fault::None),
        ([&whole[..], b"more"].concat(), Fault::None),
    ];
    for (part, fault) in cases {
        let server = serve(&files, fault);
        let cache = tempfile::tempdir().unwrap();
        let dir = cache
            .path()
            .join("models--owner--name/snapshots")
            .join(COMMIT);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("model.safetensors.part"), &part).unwrap();
        hub(&server, cache.path())
            .resolve("owner/name", false)
            .unwrap();
        assert_eq!(
            fs::read(dir.join("model.safetensors")).unwrap(),
            whole,
            "{fault:?}"
        );
    }
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let cache = cache.path();
    let server = serve(&[("README.md", b"")], Fault::None);
    refused(
        &server,
        cache,
        "owner/name",
        "owner/name has no config.json; found README.md; choose a repository of an OPT or GPT-2 \
         model",
    );
    refused(
        &server,
        cache,
        "other/name",
        "the hub at HUB has no other/name (HTTP 404); check the spelling of the model's name",
    );
    refused(
        &server,
        cache,
        "owner/private",
        "the hub at HUB refuses access to owner/private (HTTP 401): it is gated, private or \
         misspelt; accept its terms on its page and set HF_TOKEN to a token that may read it",
    );
    let with_token = Hub::new(
        &server.endpoint,
        cache.to_owned(),
        Some("secret".to_owned()),
    );
    let error = with_token
        .resolve("owner/private", false)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("owner/private has no config.json"),
        "{error}"
    );

    for model in ["name", "a/b/c", "../x", "a/..", "a b/c", "/a"] {
        refused(
            &server,
            cache,
            model,
            &format!(
                "{model:?} is no hub id; needed: owner/name, of letters, digits, '.', '_' and '-'"
            ),
        );
    }
    let server = serve(&[("config.json", b"{}"), ("tf_model.h5", b"")], Fault::None);
    refused(
        &server,
        cache,
        "owner/name",
        "owner/name has no weights (model.safetensors, pytorch_model.bin, or shards of them); \
         found config.json, tf_model.h5; choose a repository of an OPT or GPT-2 model",
    );
    let server = serve(&[], Fault::Status(503));
    refused(
        &server,
        cache,
        "owner/name",
        "HUB/api/models/owner/name/revision/main: found HTTP 503 Service Unavailable; needed HTTP \
         200 or 206; try again, or another HF_ENDPOINT",
    );
    let gone = Server {
        endpoint: "http://127.0.0.1:1".to_owned(),
        log: Arc::default(),
    };
    let error = hub(&gone, cache)
        .resolve("owner/name", false)
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("cannot reach the hub at http://127.0.0.1:1 for owner/name ("));
    assert!(error.ends_with("or give a local directory"), "{error}");
}
