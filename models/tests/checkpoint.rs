//! Reading checkpoints, and the words in which broken ones are refused.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::{fs, path::Path};

use common::{f32s, pickle, safetensors, torch, zip};
use kiln_models::checkpoint::{self, Checkpoint, SourceDType};
use tempfile::TempDir;

/// A directory with these files.
fn dir(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn open(files: &[(&str, &[u8])]) -> (TempDir, Box<dyn Checkpoint>) {
    let dir = dir(files);
    let checkpoint = checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

/// Opens the files and compares the message, in which the directory's path is `DIR`.
#[track_caller]
fn refused(files: &[(&str, &[u8])], message: &str) {
    let dir = dir(files);
    let Err(error) = checkpoint::open(dir.path()) else {
        panic!("opened; expected: {message}")
    };
    let text = error
        .to_string()
        .replace(&dir.path().display().to_string(), "DIR");
    assert_eq!(text, message);
}

#[track_caller]
fn torch_refused(pickle: &[u8], message: &str) {
    let message = format!("DIR/pytorch_model.bin: {message}");
    refused(
        &[(
            "pytorch_model.bin",
            &torch(pickle, &[("0", &f32s([0.0; 6]))]),
        )],
        &message,
    );
}

fn ab() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},
        "a":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},
        "b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}"#;
    safetensors(
        header,
        &[f32s((0..6).map(|i| i as f32)), vec![0x80, 0x3f]].concat(),
    )
}

#[test]
fn safetensors_reads_by_rows() {
    let (_dir, file) = open(&[("model.safetensors", &ab())]);
    assert_eq!(file.tensors().keys().collect::<Vec<_>>(), ["a", "b"]);
    let a = file.read("a").unwrap();
    assert_eq!(
        (a.info.dtype, a.info.shape.as_slice()),
        (SourceDType::F32, &[3, 2][..])
    );
    assert_eq!(a.to_f32().unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let rows = file.read_rows("a", 1..2).unwrap();
    assert_eq!(rows.info.shape, [1, 2]);
    assert_eq!(rows.to_f32().unwrap(), [2.0, 3.0]);
    assert_eq!(file.read("b").unwrap().to_f32().unwrap(), [1.0]);

    let message = |error: checkpoint::CheckpointError| {
        error
            .to_string()
            .replace(&file.origin().display().to_string(), "FILE")
    };
    assert_eq!(
        message(file.read("c").unwrap_err()),
        "FILE has no tensor \"c\" among its 2 tensors (the first is \"a\")"
    );
    assert_eq!(
        message(file.read_rows("a", 2..4).unwrap_err()),
        "FILE: rows 2..4 of tensor \"a\", which has 3"
    );
    assert_eq!(
        message(file.read_rows_into("a", 0..1, &mut [0; 7]).unwrap_err()),
        "a buffer of 7 bytes for rows of tensor \"a\"; needed 8 bytes"
    );
}

#[test]
fn broken_safetensors_are_refused() {
    let needed = "a safetensors file: 8 bytes of header length, the header, the tensors";
    let refused = |bytes: &[u8], message: String| {
        refused(
            &[("model.safetensors", bytes)],
            &format!("DIR/model.safetensors: {message}"),
        );
    };
    let header = |entry: &str| safetensors(&format!("{{\"a\":{entry}}}"), &[0; 24]);

    refused(
        b"abc",
        format!("found 3 bytes; needed {needed}; download the file again"),
    );
    refused(
        &[&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        format!(
            "found a header length of {} in a file of 10 bytes; needed {needed} (the header below \
             16 MiB); download the file again",
            u64::MAX
        ),
    );
    refused(
        &safetensors("[]", b""),
        "found a header that is no JSON object (invalid type: sequence, expected a map at line 1 \
         column 0); needed one; download the file again"
            .to_owned(),
    );
    refused(
        &header(r#"{"dtype":"F32","shape":[2],"data_offsets":[20,28]}"#),
        "tensor \"a\": found data_offsets 20..28; needed a range within 24 bytes".to_owned(),
    );
    refused(
        &header(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#),
        "tensor \"a\": found data_offsets 8..0; needed a range within 24 bytes".to_owned(),
    );
    refused(
        &header(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#),
        "tensor \"a\": found 8 bytes; needed 12 for F32 of shape [3]".to_owned(),
    );
    refused(
        &header(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}"#),
        "tensor \"a\": found shape [4294967296, 4294967296]; needed a size that fits 64 bits"
            .to_owned(),
    );
    refused(
        &header(r#"{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}"#),
        "tensor \"a\": found element type F8_E4M3; needed F64, F32, F16, BF16, I64, I32, I16, I8, \
         U8 or BOOL"
            .to_owned(),
    );
    let entry = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    refused(
        &safetensors(&format!("{{\"a\":{entry},\"b\":{entry}}}"), &[0; 8]),
        "tensor \"b\": found bytes shared with tensor \"a\"; needed bytes of its own".to_owned(),
    );
}

#[test]
fn torch_reads_views_of_storages() {
    let six = || pickle::storage("FloatStorage", "0", 6);
    let half = pickle::storage("HalfStorage", "1", 2);
    let entries = [
        ("whole", pickle::tensor(six(), 0, &[3, 2], &[2, 1])),
        (
            "tied",
            pickle::parameter(pickle::tensor(six(), 0, &[3, 2], &[2, 1])),
        ),
        ("tail", pickle::tensor(six(), 4, &[2], &[1])),
        ("transposed", pickle::tensor(six(), 0, &[2, 3], &[1, 2])),
        ("column", pickle::tensor(six(), 1, &[3], &[2])),
        ("empty", pickle::tensor(six(), 0, &[0, 5], &[5, 1])),
        ("half", pickle::tensor(half, 0, &[2], &[1])),
    ];
    let values = f32s((0..6).map(|i| i as f32));
    let bytes = torch(
        &pickle::state_dict(&entries),
        &[("0", &values), ("1", &[0, 0x3c, 0, 0xc0])],
    );
    let (_dir, file) = open(&[("pytorch_model.bin", &bytes)]);
    let read = |name: &str| file.read(name).unwrap().to_f32().unwrap();
    assert_eq!(read("whole"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(read("tied"), read("whole"));
    assert_eq!(read("tail"), [4.0, 5.0]);
    assert_eq!(read("transposed"), [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
    assert_eq!(
        file.read_rows("transposed", 1..2)
            .unwrap()
            .to_f32()
            .unwrap(),
        [1.0, 3.0, 5.0]
    );
    assert_eq!(read("column"), [1.0, 3.0, 5.0]);
    assert_eq!(
        file.read_rows("column", 1..3).unwrap().to_f32().unwrap(),
        [3.0, 5.0]
    );
    assert_eq!(read("empty"), [0.0; 0]);
    assert_eq!(read("half"), [1.0, -2.0]);
}

#[test]
fn pickles_that_do_more_are_refused_by_name() {
    let nothing_runs = "kiln builds tensors only and runs nothing from checkpoints: save the \
                        model's state dict, or convert it to safetensors";
    torch_refused(
        &[
            &b"\x80\x02"[..],
            &pickle::global("posix", "system"),
            &pickle::text("true"),
            b"\x85R.",
        ]
        .concat(),
        &format!("the pickle asks for posix.system; {nothing_runs}"),
    );
    torch_refused(
        &[
            &b"\x80\x04"[..],
            &pickle::text("builtins"),
            &pickle::text("eval"),
            b"\x93.",
        ]
        .concat(),
        &format!("the pickle asks for builtins.eval; {nothing_runs}"),
    );
    let writes = "needed: what torch.save writes for a state dict of tensors";
    torch_refused(
        b"\x80\x02(S'x'\nios\nsystem\n.",
        &format!("the pickle uses opcode STRING (0x53) at byte 3; {writes}"),
    );
    torch_refused(
        b"\x80\x02)\x81.",
        &format!("the pickle uses opcode NEWOBJ (0x81) at byte 3; {writes}"),
    );
    torch_refused(
        b"\x80\x02\xff",
        &format!("the pickle uses opcode (unknown) (0xff) at byte 2; {writes}"),
    );
}

#[test]
fn malformed_pickles_are_refused() {
    torch_refused(
        b"\x80\x02X\xff\xff\xff\xffab",
        "the pickle ends at byte 9, within an instruction; download the file again",
    );
    torch_refused(
        b"\x80\x02t.",
        "the pickle is malformed at byte 2: needed a mark on the stack",
    );
    torch_refused(
        b"\x80\x02h\x07.",
        "the pickle is malformed at byte 2: needed a memo slot that was filled",
    );
    torch_refused(
        b"\x80\x02K\x01.",
        "entry \"(the whole)\" of the pickle is an integer; needed: a dictionary of tensors by name",
    );
    torch_refused(
        &pickle::state_dict(&[("epoch", pickle::int(3))]),
        "entry \"epoch\" of the pickle is an integer; needed: a dictionary of tensors by name",
    );
    torch_refused(
        &pickle::state_dict(&[("a", pickle::tensor(pickle::int(1), 0, &[1], &[1]))]),
        "the pickle is malformed at byte 125: needed a storage under the tensor",
    );
    torch_refused(
        &[&b"\x80\x02"[..], &b"(".repeat(2 << 20), b"."].concat(),
        "the pickle has more than 1048576 marks; no state dict has as many",
    );
    torch_refused(
        &[&b"\x80\x02Nq\x00"[..], &b"h\x00".repeat(1 << 20), b"."].concat(),
        "the pickle has more than 1048576 values on the stack; no state dict has as many",
    );
    torch_refused(
        &[&b"\x80\x02)"[..], &b"\x85".repeat(2 << 20), b"."].concat(),
        "the pickle has more than 1048576 values; no state dict has as many",
    );
    // Deep and cyclic values do no harm.
    torch_refused(
        &[&b"\x80\x02)"[..], &b"\x85".repeat(1 << 19), b"."].concat(),
        "entry \"(the whole)\" of the pickle is a tuple; needed: a dictionary of tensors by name",
    );
    torch_refused(
        b"\x80\x02]q\x00h\x00a.",
        "entry \"(the whole)\" of the pickle is a list; needed: a dictionary of tensors by name",
    );
}

#[test]
fn tensors_outside_their_storage_are_refused() {
    let refused = |view: Vec<u8>, message: &str| {
        torch_refused(
            &pickle::state_dict(&[("a", view)]),
            &format!("tensor \"a\": {message}"),
        );
    };
    let six = || pickle::storage("FloatStorage", "0", 6);
    refused(
        pickle::tensor(six(), 1, &[3, 2], &[2, 1]),
        "found shape [3, 2], strides [2, 1], offset 1; needed a view within a storage of 6 elements",
    );
    refused(
        pickle::tensor(six(), 0, &[1000, 1000], &[0, 0]),
        "found shape [1000, 1000], strides [0, 0], offset 0; needed a view within a storage of 6 \
         elements",
    );
    refused(
        pickle::tensor(pickle::storage("FloatStorage", "0", 7), 0, &[7], &[1]),
        "found a storage of 24 bytes; needed 7 elements of F32",
    );
    refused(
        pickle::tensor(pickle::storage("FloatStorage", "9", 6), 0, &[6], &[1]),
        "found no entry data/9 in the archive; needed the storage that the pickle names",
    );
}

#[test]
fn files_that_are_no_torch_archives_are_refused() {
    refused(
        &[(
            "pytorch_model.bin",
            b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
        )],
        "DIR/pytorch_model.bin is in torch's legacy format, which kiln does not read; load and \
         save it once with torch 1.6 or later, or convert it to safetensors",
    );
    let dir = dir(&[(
        "pytorch_model.bin",
        b"version https://git-lfs.github.com/spec/v1\n",
    )]);
    let Err(error) = checkpoint::open(dir.path()) else {
        panic!("opened")
    };
    let text = error.to_string();
    assert!(text.contains("is not a torch checkpoint: "), "{text}");
    assert!(
        text.contains("needed: the zip format of torch.save"),
        "{text}"
    );

    refused(
        &[("pytorch_model.bin", &zip(&[("a.txt", b"x")], false))],
        "DIR/pytorch_model.bin: found an archive of 1 entries; needed torch.save's archive, with \
         one <root>/data.pkl; download the file again",
    );
    refused(
        &[("pytorch_model.bin", &zip(&[("m/data.pkl", b"x")], true))],
        "DIR/pytorch_model.bin: found entry \"m/data.pkl\", compressed, of 1 bytes; needed an \
         uncompressed entry of at most 16777216 bytes; download the file again",
    );
    refused(
        &[(
            "pytorch_model.bin",
            &zip(&[("m/data.pkl", b"x"), ("m/byteorder", b"big")], false),
        )],
        "DIR/pytorch_model.bin: found big-endian storages; needed little-endian ones; download the \
         file again",
    );
}

#[test]
fn shards_are_found_through_their_index() {
    let index = br#"{"metadata":{},"weight_map":{"a":"x.safetensors","b":"x.safetensors"}}"#;
    let (_dir, file) = open(&[
        ("model.safetensors.index.json", index),
        ("x.safetensors", &ab()),
    ]);
    assert_eq!(
        file.read_rows("a", 1..2).unwrap().to_f32().unwrap(),
        [2.0, 3.0]
    );

    let refused = |index: &str, message: &str| {
        refused(
            &[
                ("model.safetensors.index.json", index.as_bytes()),
                ("x.safetensors", &ab()),
            ],
            &format!("DIR/model.safetensors.index.json{message}"),
        );
    };
    refused(
        r#"{"weight_map":{"a":"../x.safetensors"}}"#,
        " names the shard \"../x.safetensors\"; needed: a plain file name next to the index, \
         ending in .safetensors or .bin",
    );
    refused(
        r#"{"weight_map":{"a":"/etc/passwd"}}"#,
        " names the shard \"/etc/passwd\"; needed: a plain file name next to the index, ending in \
         .safetensors or .bin",
    );
    refused(
        r#"{"weight_map":{"a":"y.safetensors"}}"#,
        " names the shard \"y.safetensors\", which is missing; download it next to the index",
    );
    refused(
        r#"{"weight_map":{"c":"x.safetensors"}}"#,
        " places tensor \"c\" in shard \"x.safetensors\", which does not hold it; index and shards \
         are from different checkpoints: download them again",
    );
    refused(
        "{}",
        ": found text that does not parse (missing field `weight_map` at line 1 column 2); needed \
         an index: a JSON object with a weight_map of tensor names to file names; download the file \
         again",
    );
}

#[test]
fn safetensors_are_preferred_and_absence_is_told() {
    let (_dir, file) = open(&[
        ("model.safetensors", &ab()),
        ("pytorch_model.bin", b"not read"),
    ]);
    assert_eq!(file.tensors().len(), 2);
    refused(
        &[("README.md", b""), ("tf_model.h5", b"")],
        "no weights in DIR: found README.md, tf_model.h5; needed model.safetensors, \
         pytorch_model.bin, or the index json of their shards; give the checkpoint's own directory \
         or download it again",
    );
}

#[test]
fn integers_are_no_weights() {
    let header = r#"{"mask":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let (_dir, file) = open(&[("model.safetensors", &safetensors(header, &[1]))]);
    assert_eq!(
        file.read("mask").unwrap().to_f32().unwrap_err().to_string(),
        "tensor \"mask\" has elements of type U8; needed F32, F16, BF16 or F64"
    );
}

/// The same weights, stored by torch and transformers in each format.
#[test]
fn formats_of_the_same_weights_agree() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let pairs = [
        ("tiny-opt", "tiny-opt-bin"),
        ("tiny-opt-sharded", "tiny-opt-bin-sharded"),
    ];
    for (reference, twin) in pairs {
        let open = |name: &str| checkpoint::open(&fixtures.join(name)).unwrap();
        let (reference, twin) = (open(reference), open(twin));
        let mut compared = 0;
        for name in reference.tensors().keys() {
            // Older checkpoints have no "model." before "decoder.".
            let short = name.strip_prefix("model.").unwrap_or(name);
            let other = if twin.tensors().contains_key(name) {
                name
            } else {
                short
            };
            let (a, b) = (reference.read(name).unwrap(), twin.read(other).unwrap());
            assert_eq!(a.info.shape, b.info.shape, "{name}");
            assert_eq!(a.to_f32().unwrap(), b.to_f32().unwrap(), "{name}");
            compared += 1;
        }
        assert!(compared > 10);
    }
}
