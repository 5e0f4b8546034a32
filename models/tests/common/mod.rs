//! Checkpoint files assembled by hand: zip archives, pickles, safetensors.

// Each test binary uses its own part of this, and none exports it.
#![allow(dead_code, unreachable_pub)]

/// A zip archive of stored entries. `compress` marks the entries as deflated, which they are not.
pub fn zip(entries: &[(&str, &[u8])], compress: bool) -> Vec<u8> {
    let method = if compress { 8u16 } else { 0 };
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let offset = out.len() as u32;
        let mut common = Vec::new();
        for field in [20u16, 0, method, 0, 0x21] {
            common.extend(field.to_le_bytes());
        }
        for field in [crc32(data), data.len() as u32, data.len() as u32] {
            common.extend(field.to_le_bytes());
        }
        common.extend((name.len() as u16).to_le_bytes());
        common.extend(0u16.to_le_bytes());
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(name.as_bytes());
        out.extend(*data);
        directory.extend(b"PK\x01\x02");
        directory.extend(20u16.to_le_bytes());
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let start = out.len() as u32;
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    for _ in 0..2 {
        out.extend((entries.len() as u16).to_le_bytes());
    }
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend(0u16.to_le_bytes());
    out
}

fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// The parts of a pickle as `torch.save` writes them.
pub mod pickle {
    pub fn text(text: &str) -> Vec<u8> {
        [
            &b"X"[..],
            &(text.len() as u32).to_le_bytes(),
            text.as_bytes(),
        ]
        .concat()
    }

    pub fn int(value: i32) -> Vec<u8> {
        [&b"J"[..], &value.to_le_bytes()].concat()
    }

    pub fn global(module: &str, name: &str) -> Vec<u8> {
        format!("c{module}\n{name}\n").into_bytes()
    }

    pub fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
        [&b"("[..], &items.concat(), b"t"].concat()
    }

    pub fn ints(values: &[i32]) -> Vec<u8> {
        tuple(&values.iter().map(|&v| int(v)).collect::<Vec<_>>())
    }

    pub fn storage(kind: &str, key: &str, elements: i32) -> Vec<u8> {
        let id = [
            text("storage"),
            global("torch", kind),
            text(key),
            text("cpu"),
            int(elements),
        ];
        [&tuple(&id)[..], b"Q"].concat()
    }

    pub fn tensor(storage: Vec<u8>, offset: i32, shape: &[i32], stride: &[i32]) -> Vec<u8> {
        let hooks = [&global("collections", "OrderedDict")[..], b")R"].concat();
        let arguments = tuple(&[
            storage,
            int(offset),
            ints(shape),
            ints(stride),
            b"\x89".to_vec(),
            hooks,
        ]);
        [
            &global("torch._utils", "_rebuild_tensor_v2")[..],
            &arguments,
            b"R",
        ]
        .concat()
    }

    pub fn parameter(data: Vec<u8>) -> Vec<u8> {
        let hooks = [&global("collections", "OrderedDict")[..], b")R"].concat();
        let arguments = tuple(&[data, b"\x88".to_vec(), hooks]);
        [
            &global("torch._utils", "_rebuild_parameter")[..],
            &arguments,
            b"R",
        ]
        .concat()
    }

    /// A state dict with the `_metadata` that torch hangs onto it.
    pub fn state_dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut out = b"\x80\x02".to_vec();
        out.extend(global("collections", "OrderedDict"));
        out.extend(b")Rq\x00(");
        for (name, value) in entries {
            out.extend(text(name));
            out.extend(value);
        }
        out.extend(b"u}");
        out.extend(text("_metadata"));
        out.extend(global("collections", "OrderedDict"));
        out.extend(b")Rsb.");
        out
    }
}

/// A torch checkpoint of a pickle and its storages.
pub fn torch(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
    let names: Vec<String> = storages
        .iter()
        .map(|(key, _)| format!("m/data/{key}"))
        .collect();
    let mut entries = vec![("m/data.pkl", pickle), ("m/byteorder", b"little")];
    entries.extend(
        names
            .iter()
            .zip(storages)
            .map(|(name, (_, data))| (name.as_str(), *data)),
    );
    zip(&entries, false)
}

/// A safetensors file of a header and data.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        data,
    ]
    .concat()
}

pub fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}
