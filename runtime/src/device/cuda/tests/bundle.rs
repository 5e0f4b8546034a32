//! A bundle for a CUDA target, with launches but without machine code.

use crate::testing::manifest as fake_manifest;
use kiln_bundle::{
    Argument, Buffer, BufferId, Bundle, BundleWriter, CopyLaunch, DType, Image, KernelSpec, Launch,
    Linear, Norm, Program, RowKind, Rows, Tap, Target, TensorDecl, WeightFormat, WriteError,
    packing::Layout,
};
use std::path::Path;

pub(super) const V: u32 = 40;
pub(super) const C: u32 = 32;
pub(super) const LAYERS: u32 = 2;
pub(super) const MAX_SEQ_LEN: u32 = 96;
/// Bytes of a layer's keys and values in a block, in f16.
pub(super) const LAYER_BYTES: u64 = 2 * C as u64 * 16 * 2;

/// Entry points, in the order of the images.
pub(super) const IMAGES: [&str; 5] = ["embed", "layer", "combine", "head", "copy"];

pub(super) fn norm() -> Option<Norm> {
    Some(Norm {
        weight: Some("norm.w".to_owned()),
        bias: Some("norm.b".to_owned()),
        eps: 1e-5,
    })
}

/// Embedding, two layers of qkv and attention alone, and a head.
pub(super) fn program() -> Program {
    let buffer = |rows, width, dtype| Buffer { rows, width, dtype };
    let linear = |[input, out]: [u32; 2], weight: &str, out_features| Linear {
        input: BufferId(input),
        norm: None,
        rows: Rows::All,
        weight: weight.to_owned(),
        bias: None,
        activation: None,
        residual: None,
        in_features: C,
        out_features,
        out: BufferId(out),
    };
    let mut kernels = vec![KernelSpec::Embed {
        tokens: Some("tokens".to_owned()),
        positions: None,
        position_offset: 0,
        out: BufferId(0),
    }];
    for layer in 0..LAYERS {
        kernels.push(KernelSpec::Qkv {
            linear: linear([2 * layer, 2 * layer + 1], "qkv", 3 * C),
            layer,
        });
        kernels.push(KernelSpec::Attention {
            q: BufferId(2 * layer + 1),
            layer,
            heads: 2,
            head_dim: C / 2,
            scale: 1.0,
            out: BufferId(2 * layer + 2),
        });
    }
    kernels.push(KernelSpec::Linear(Linear {
        rows: Rows::Logits,
        ..linear([4, 5], "tokens", V)
    }));
    kernels.push(KernelSpec::Sample {
        logits: BufferId(5),
    });
    let tap = |after_kernel, buffer, norm| Tap {
        after_kernel,
        buffer: BufferId(buffer),
        norm,
    };
    let tokens = |width| buffer(RowKind::Tokens, width, DType::F16);
    Program {
        name: "all".to_owned(),
        buffers: vec![
            tokens(C),
            tokens(3 * C),
            tokens(C),
            tokens(3 * C),
            tokens(C),
            buffer(RowKind::Logits, V, DType::F32),
        ],
        kernels,
        logits: BufferId(5),
        hidden_states: vec![tap(0, 0, None), tap(2, 2, None), tap(4, 4, norm())],
    }
}

/// Every layer is two launches of attention's work, and none of the qkv's own.
pub(super) fn launches() -> Vec<Launch> {
    let launch = |kernel, image, mut arguments: Vec<Argument>| {
        arguments.insert(0, Argument::Step);
        Launch {
            kernel,
            image,
            grid: [kernel + 1, 2, 3],
            arguments,
        }
    };
    let buffer = |id| Argument::Buffer(BufferId(id));
    let weight = |name: &str| Argument::Weight(name.to_owned());
    let mut all = vec![launch(
        0,
        0,
        vec![weight("tokens"), weight("qkv"), buffer(0)],
    )];
    for layer in 0..LAYERS {
        let kernel = 2 * layer + 2;
        let workspace = Argument::Workspace { offset_bytes: 64 };
        all.push(launch(
            kernel,
            1,
            vec![
                Argument::KvLayer(layer),
                workspace,
                Argument::Counters,
                buffer(2 * layer + 1),
            ],
        ));
        all.push(launch(kernel, 2, vec![buffer(2 * layer + 2)]));
    }
    all.push(launch(
        5,
        3,
        vec![weight("norm.w"), weight("tokens"), buffer(5)],
    ));
    all
}

pub(super) fn write_bundle(path: &Path, change: impl FnOnce(&mut Target)) -> Bundle {
    let mut manifest = fake_manifest(80, 4, MAX_SEQ_LEN);
    manifest.model.vocab_size = V;
    manifest.model.hidden_size = C;
    manifest.model.head_dim = C / 2;
    manifest.self_test.token_ids = vec![1];
    manifest.self_test.top_logits = vec![(0, 1.0)];
    let mut writer = BundleWriter::create(path).unwrap();
    let target = &mut manifest.targets[0];
    target.name = "sm_90a".to_owned();
    target.weights = WeightFormat::F16;
    target.tables = DType::F16;
    target.dtype = DType::F16;
    target.layout = Layout::Tiles;
    target.weights_file = "weights.safetensors".to_owned();
    let program = program();
    for executable in &mut target.executables {
        let bounds = executable.bounds;
        let mut end = 0;
        for buffer in &program.buffers {
            executable.offsets_bytes.push(end);
            let elements = u64::from(bounds.rows(buffer.rows)) * u64::from(buffer.width);
            end += (elements * buffer.dtype.size_bytes() as u64).next_multiple_of(64);
        }
        executable.arena_bytes = end;
        executable.workspace_bytes = 128;
        executable.counters = 3;
        executable.launches = launches();
    }
    target.programs = vec![program];
    for entry in IMAGES {
        let source = format!("{entry}.cu");
        writer.add_file(&source, b"// nothing").unwrap();
        target.images.push(Image {
            entry: entry.to_owned(),
            source,
            cubin: None,
            block_threads: 128,
            dynamic_smem_bytes: 0,
        });
    }
    target.copy_blocks = Some(CopyLaunch {
        image: 4,
        grid_x: 7,
    });
    change(target);
    let declare = |name: &str, dtype, shape| TensorDecl {
        name: name.to_owned(),
        dtype,
        shape,
    };
    let matrix = |n| Layout::Tiles.shape(DType::F16, n as usize, C as usize);
    let tensors = [
        declare("tokens", DType::F16, matrix(V)),
        declare("qkv", DType::F16, matrix(3 * C)),
        declare("norm.w", DType::F32, vec![C as usize]),
        declare("norm.b", DType::F32, vec![C as usize]),
    ];
    writer
        .add_tensors("weights.safetensors", &tensors, |tensor, sink| {
            let bytes = tensor.bytes() as usize;
            match tensor.name.as_str() {
                "norm.w" => sink.write(bytemuck::cast_slice(&[2f32; C as usize]))?,
                "norm.b" => sink.write(bytemuck::cast_slice(&[0.5f32; C as usize]))?,
                name => sink.write(&vec![name.len() as u8; bytes])?,
            }
            Ok::<(), WriteError>(())
        })
        .unwrap();
    writer.finish(manifest).unwrap();
    Bundle::open(path).unwrap()
}
