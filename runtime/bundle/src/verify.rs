//! When a manifest is sound.
//!
//! The compiler runs [`Manifest::verify`] before it writes a bundle and the reader before it trusts
//! one; past it, a device may index by every id and offset of the manifest without a further check:
//!
//! - dimensions are not zero and below 2^24, C = H * D, sizes computed from them fit in 64 bits;
//! - a program's buffer ids exist, its kernels' widths agree with the buffers that they name;
//! - no kernel reads a buffer that overlaps, in any executable's memory plan, the one it writes,
//!   and every buffer read has been written by an earlier kernel;
//! - buffers lie inside the arena at offsets aligned to [`ALIGN_BYTES`];
//! - there is an executable of each phase, and a prefill step of one token always fits one;
//! - hidden states number L+1, and their kernels write the buffers that they name;
//! - every exception from the target's format is a matrix, and activations are rounded for the CPU alone;
//! - launches name kernels, images, buffers, layers and weights that exist, lie in their workspace
//!   and go through the program's kernels in order;
//! - a target has images, launches and a launch that copies blocks, or none of them.
//!
//! Weights are checked against the weight file by the reader, from [`Program::weight_uses`].

use crate::{
    ALIGN_BYTES, Argument, BufferId, DType, Executable, Image, KernelSpec, Linear, Manifest, Norm,
    Phase, Program, RowKind, Rows, Target, packing::Layout,
};
use std::collections::{BTreeMap, BTreeSet};

/// Upper bound of every dimension: products of two fit easily in 64 bits.
const MAX_DIMENSION: u32 = 1 << 24;
/// Upper bound of a program's kernels and buffers: far above any model, far below memory.
const MAX_ITEMS: usize = 1 << 16;

/// Upper bounds of CUDA on a block and on the grid's x, and its y and z.
const MAX_BLOCK_THREADS: u32 = 1024;
const MAX_GRID_X: u32 = i32::MAX as u32;
const MAX_GRID_YZ: u32 = 65535;

/// A manifest that contradicts itself: the writer's mistake, or a damaged bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct ManifestError {
    /// Where in the manifest.
    pub place: String,
    /// What was found and what was needed.
    pub problem: String,
}

/// What a kernel needs of a tensor in the weight file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightRole {
    /// A matrix in the target's layout, in its format.
    Packed {
        /// Outputs.
        n: usize,
        /// Inputs.
        k: usize,
    },
    /// f32 (len).
    Vector {
        /// Elements.
        len: usize,
    },
    /// Row-major (rows, width) with at least `min_rows` rows, in the target's type of tables.
    Table {
        /// Fewest rows that serve every position of the bundle's limit.
        min_rows: usize,
        /// Elements of a row.
        width: usize,
    },
}

impl WeightRole {
    /// The element type in the weight file, of the tensor `name` of a target.
    pub fn element(&self, target: &Target, name: &str) -> DType {
        match self {
            WeightRole::Packed { .. } => target.format(name).element(),
            WeightRole::Vector { .. } => DType::F32,
            WeightRole::Table { .. } => target.tables,
        }
    }

    /// The shape in the weight file, of the tensor `name` of a target; for a table, its smallest.
    pub fn shape(&self, target: &Target, name: &str) -> Vec<usize> {
        match *self {
            WeightRole::Packed { n, k } => target.format(name).shape(target.layout, n, k),
            WeightRole::Vector { len } => vec![len],
            WeightRole::Table { min_rows, width } => vec![min_rows, width],
        }
    }
}

type Check<T = ()> = Result<T, ManifestError>;

fn fail<T>(place: &str, problem: impl Into<String>) -> Check<T> {
    Err(ManifestError {
        place: place.to_owned(),
        problem: problem.into(),
    })
}

fn dimension(place: &str, name: &str, value: u32) -> Check {
    if value == 0 || value >= MAX_DIMENSION {
        return fail(
            place,
            format!(
                "{name} is {value}; it must be from 1 to {}",
                MAX_DIMENSION - 1
            ),
        );
    }
    Ok(())
}

impl Manifest {
    /// Checks everything that the module's documentation lists.
    ///
    /// # Errors
    /// The first contradiction, with its place.
    pub fn verify(&self) -> Result<(), ManifestError> {
        let model = &self.model;
        for (name, value) in [
            ("vocab_size", model.vocab_size),
            ("hidden_size", model.hidden_size),
            ("layers", model.layers),
            ("heads", model.heads),
            ("head_dim", model.head_dim),
            ("max_positions", model.max_positions),
        ] {
            dimension("model", name, value)?;
        }
        if u64::from(model.heads) * u64::from(model.head_dim) != u64::from(model.hidden_size) {
            return fail(
                "model",
                format!(
                    "hidden_size is {}, but heads * head_dim is {} * {}",
                    model.hidden_size, model.heads, model.head_dim
                ),
            );
        }
        dimension("limits", "max_batch", self.limits.max_batch)?;
        dimension("limits", "max_seq_len", self.limits.max_seq_len)?;
        if self.limits.max_seq_len > model.max_positions {
            return fail(
                "limits",
                format!(
                    "max_seq_len is {}, above the model's {} positions",
                    self.limits.max_seq_len, model.max_positions
                ),
            );
        }
        let vocabulary = 0..model.vocab_size;
        let special = model.eos_token_ids.iter().chain(&model.bos_token_id);
        let tested = &self.self_test;
        for &id in special
            .chain(&tested.token_ids)
            .chain(tested.top_logits.iter().map(|(id, _)| id))
        {
            if !vocabulary.contains(&id) {
                return fail(
                    "model",
                    format!(
                        "token id {id} is outside the vocabulary of {}",
                        model.vocab_size
                    ),
                );
            }
        }
        if tested.token_ids.is_empty() || tested.top_logits.is_empty() {
            return fail("self_test", "it has no tokens or no logits");
        }
        if tested.token_ids.len() > self.limits.max_seq_len as usize {
            return fail("self_test", "its prompt is longer than max_seq_len");
        }
        for target in &self.targets {
            verify_target(self, target)?;
        }
        Ok(())
    }
}

fn verify_target(manifest: &Manifest, target: &Target) -> Check {
    let place = format!("target {}", target.name);
    for (field, dtype) in [("tables", target.tables), ("dtype", target.dtype)] {
        if !dtype.is_float() {
            return fail(
                &place,
                format!("{field} is {dtype}, which is no floating-point type"),
            );
        }
    }
    if let (Some(activations), Layout::Tiles) = (target.activations, target.layout) {
        return fail(
            &place,
            format!(
                "activations are {}, which is for the CPU",
                activations.name()
            ),
        );
    }
    if !manifest.files.contains_key(&target.weights_file) {
        return fail(
            &place,
            format!(
                "weights_file {:?} is not listed in files",
                target.weights_file
            ),
        );
    }
    for program in &target.programs {
        verify_program(manifest, program)
            .map_err(|error| within(&format!("{place}, program {}", program.name), error))?;
    }
    verify_exceptions(manifest, target).map_err(|error| within(&place, error))?;
    for (index, image) in target.images.iter().enumerate() {
        verify_image(manifest, image)
            .map_err(|error| within(&format!("{place}, image {index}"), error))?;
    }
    verify_copies(target).map_err(|error| within(&format!("{place}, copy_blocks"), error))?;
    for executable in &target.executables {
        verify_executable(manifest, target, executable)
            .map_err(|error| within(&format!("{place}, executable {}", executable.name), error))?;
    }
    for phase in [Phase::Prefill, Phase::Decode] {
        if !target.executables.iter().any(|e| e.phase == phase) {
            return fail(&place, format!("it has no {} executable", phase.name()));
        }
        let longest = target
            .executables
            .iter()
            .filter(|e| e.phase == phase && e.bounds.hidden_states)
            .map(|e| e.bounds.max_kv_len)
            .max();
        if longest < Some(manifest.limits.max_seq_len) {
            return fail(
                &place,
                format!(
                    "no {} executable that shows hidden states reaches max_seq_len",
                    phase.name()
                ),
            );
        }
    }
    Ok(())
}

/// Every exception is a matrix of some program.
fn verify_exceptions(manifest: &Manifest, target: &Target) -> Check {
    if target.exceptions.is_empty() {
        return Ok(());
    }
    let mut matrices = BTreeSet::new();
    for program in &target.programs {
        let uses = program.weight_uses(manifest)?.into_iter();
        matrices.extend(
            uses.filter(|(_, role)| matches!(role, WeightRole::Packed { .. }))
                .map(|(name, _)| name),
        );
    }
    match target
        .exceptions
        .keys()
        .find(|&name| !matrices.contains(name))
    {
        Some(name) => fail(
            "exceptions",
            format!("{name:?} is no matrix of its programs"),
        ),
        None => Ok(()),
    }
}

fn within(place: &str, error: ManifestError) -> ManifestError {
    let inner = if error.place.is_empty() {
        String::new()
    } else {
        format!(", {}", error.place)
    };
    ManifestError {
        place: format!("{place}{inner}"),
        problem: error.problem,
    }
}

fn verify_program(manifest: &Manifest, program: &Program) -> Check {
    if program.kernels.len() > MAX_ITEMS || program.buffers.len() > MAX_ITEMS {
        return fail("", format!("more than {MAX_ITEMS} kernels or buffers"));
    }
    for (index, buffer) in program.buffers.iter().enumerate() {
        dimension(&format!("buffer b{index}"), "width", buffer.width)?;
        if !buffer.dtype.is_float() {
            return fail(
                &format!("buffer b{index}"),
                format!("dtype is {}; activations are floating point", buffer.dtype),
            );
        }
    }
    let mut written = vec![false; program.buffers.len()];
    for (index, kernel) in program.kernels.iter().enumerate() {
        let place = format!("kernel {index} ({})", kernel.name());
        verify_kernel(manifest, program, kernel).map_err(|error| within(&place, error))?;
        for buffer in kernel.reads() {
            if !written[buffer.0 as usize] {
                return fail(
                    &place,
                    format!("it reads {buffer}, which no earlier kernel wrote"),
                );
            }
        }
        if let Some(out) = kernel.writes() {
            written[out.0 as usize] = true;
        }
    }
    let logits = buffer(program, program.logits)?;
    if (logits.rows, logits.width, logits.dtype)
        != (RowKind::Logits, manifest.model.vocab_size, DType::F32)
    {
        return fail("", "the logits buffer is not f32 (R, V)");
    }
    if !written[program.logits.0 as usize] {
        return fail("", "no kernel writes the logits");
    }
    let states = program.hidden_states.len();
    if states != 0 && states != manifest.model.layers as usize + 1 {
        return fail(
            "",
            format!(
                "it has {states} hidden states; layers + 1 are {}",
                manifest.model.layers + 1
            ),
        );
    }
    for tap in &program.hidden_states {
        let kernel = program.kernels.get(tap.after_kernel as usize);
        if kernel.and_then(KernelSpec::writes) != Some(tap.buffer) {
            return fail(
                "",
                format!(
                    "a hidden state names kernel {}, which does not write {}",
                    tap.after_kernel, tap.buffer
                ),
            );
        }
        expect_buffer(
            program,
            tap.buffer,
            RowKind::Tokens,
            manifest.model.hidden_size,
        )?;
        verify_norm(&tap.norm)?;
    }
    Ok(())
}

fn buffer(program: &Program, id: BufferId) -> Check<&crate::Buffer> {
    match program.buffers.get(id.0 as usize) {
        Some(buffer) => Ok(buffer),
        None => fail(
            "",
            format!(
                "buffer {id} does not exist; there are {}",
                program.buffers.len()
            ),
        ),
    }
}

fn expect_buffer(program: &Program, id: BufferId, rows: RowKind, width: u32) -> Check {
    let found = buffer(program, id)?;
    if (found.rows, found.width) != (rows, width) {
        return fail(
            "",
            format!(
                "buffer {id} is ({:?}, {}), needed is ({rows:?}, {width})",
                found.rows, found.width
            ),
        );
    }
    Ok(())
}

fn verify_norm(norm: &Option<Norm>) -> Check {
    match norm {
        Some(norm) if !(norm.eps.is_finite() && norm.eps >= 0.0) => {
            fail("", format!("eps of a norm is {}", norm.eps))
        }
        _ => Ok(()),
    }
}

fn verify_layer(manifest: &Manifest, layer: u32) -> Check {
    if layer >= manifest.model.layers {
        return fail(
            "",
            format!("layer {layer} of {} does not exist", manifest.model.layers),
        );
    }
    Ok(())
}

fn verify_kernel(manifest: &Manifest, program: &Program, kernel: &KernelSpec) -> Check {
    let model = &manifest.model;
    match kernel {
        KernelSpec::Embed {
            tokens,
            positions,
            position_offset,
            out,
        } => {
            if tokens.is_none() && positions.is_none() {
                return fail("", "it has neither a token nor a position table");
            }
            if *position_offset >= MAX_DIMENSION {
                return fail("", format!("position_offset is {position_offset}"));
            }
            let width = buffer(program, *out)?.width;
            expect_buffer(program, *out, RowKind::Tokens, width)
        }
        KernelSpec::Linear(linear) => verify_linear(program, linear),
        KernelSpec::Qkv { linear, layer } => {
            verify_linear(program, linear)?;
            verify_layer(manifest, *layer)?;
            if u64::from(linear.out_features) != 3 * u64::from(model.hidden_size) {
                return fail(
                    "",
                    format!(
                        "out_features is {}; 3C is 3 * {}",
                        linear.out_features, model.hidden_size
                    ),
                );
            }
            if linear.rows != Rows::All || linear.activation.is_some() || linear.residual.is_some()
            {
                return fail(
                    "",
                    "q, k and v have no activation, residual or row selection",
                );
            }
            expect_buffer(program, linear.out, RowKind::Tokens, linear.out_features)
        }
        KernelSpec::Attention {
            q,
            layer,
            heads,
            head_dim,
            scale,
            out,
        } => {
            verify_layer(manifest, *layer)?;
            if (*heads, *head_dim) != (model.heads, model.head_dim) {
                return fail(
                    "",
                    format!(
                        "heads and head_dim are {heads} and {head_dim}, the model's are {} and {}",
                        model.heads, model.head_dim
                    ),
                );
            }
            if !scale.is_finite() {
                return fail("", format!("scale is {scale}"));
            }
            expect_buffer(program, *q, RowKind::Tokens, 3 * model.hidden_size)?;
            expect_buffer(program, *out, RowKind::Tokens, model.hidden_size)
        }
        KernelSpec::Sample { logits } => {
            expect_buffer(program, *logits, RowKind::Logits, model.vocab_size)
        }
    }
}

fn verify_linear(program: &Program, linear: &Linear) -> Check {
    dimension("", "in_features", linear.in_features)?;
    dimension("", "out_features", linear.out_features)?;
    let rows_in = buffer(program, linear.input)?.rows;
    let rows_out = match linear.rows {
        Rows::All => rows_in,
        Rows::Logits => RowKind::Logits,
    };
    if linear.rows == Rows::Logits && rows_in != RowKind::Tokens {
        return fail(
            "",
            "it selects logit rows from a buffer that has no token rows",
        );
    }
    expect_buffer(program, linear.input, rows_in, linear.in_features)?;
    expect_buffer(program, linear.out, rows_out, linear.out_features)?;
    verify_norm(&linear.norm)?;
    if let Some(residual) = &linear.residual {
        expect_buffer(program, residual.buffer, rows_in, linear.out_features)?;
        verify_norm(&residual.norm)?;
    }
    Ok(())
}

fn verify_executable(manifest: &Manifest, target: &Target, executable: &Executable) -> Check {
    let Some(program) = target.programs.get(executable.program as usize) else {
        return fail(
            "",
            format!(
                "program {} does not exist; there are {}",
                executable.program,
                target.programs.len()
            ),
        );
    };
    let bounds = &executable.bounds;
    for (name, value) in [
        ("max_tokens", bounds.max_tokens),
        ("max_sequences", bounds.max_sequences),
        ("max_kv_len", bounds.max_kv_len),
        ("max_logit_rows", bounds.max_logit_rows),
    ] {
        dimension("", name, value)?;
    }
    let limits = &manifest.limits;
    if bounds.max_sequences > limits.max_batch || bounds.max_kv_len > limits.max_seq_len {
        return fail("", "its bounds exceed the bundle's limits");
    }
    if bounds.max_logit_rows > bounds.max_tokens || bounds.max_sequences > bounds.max_tokens {
        return fail("", "it has more sequences or logit rows than tokens");
    }
    if bounds.max_logit_rows < bounds.max_sequences {
        return fail("", "it has fewer logit rows than sequences");
    }
    if bounds.hidden_states == program.hidden_states.is_empty() {
        return fail("", "its program and its bounds disagree on hidden states");
    }
    if executable.offsets_bytes.len() != program.buffers.len() {
        return fail(
            "",
            format!(
                "it places {} buffers of {}",
                executable.offsets_bytes.len(),
                program.buffers.len()
            ),
        );
    }
    let mut ranges = Vec::with_capacity(program.buffers.len());
    for (index, (buffer, &start)) in program
        .buffers
        .iter()
        .zip(&executable.offsets_bytes)
        .enumerate()
    {
        let bytes = u64::from(bounds.rows(buffer.rows))
            * u64::from(buffer.width)
            * buffer.dtype.size_bytes() as u64;
        let end = start.checked_add(bytes);
        if !start.is_multiple_of(ALIGN_BYTES as u64)
            || end.is_none_or(|end| end > executable.arena_bytes)
        {
            return fail(
                "",
                format!(
                    "buffer b{index} of {bytes} bytes at {start} is unaligned or outside the arena of {} bytes",
                    executable.arena_bytes
                ),
            );
        }
        ranges.push((start, start + bytes));
    }
    let overlap = |a: BufferId, b: BufferId| {
        let (a, b) = (ranges[a.0 as usize], ranges[b.0 as usize]);
        a.0 < b.1 && b.0 < a.1
    };
    for (index, kernel) in program.kernels.iter().enumerate() {
        let Some(out) = kernel.writes() else { continue };
        if let Some(read) = kernel.reads().into_iter().find(|&read| overlap(read, out)) {
            return fail(
                "",
                format!(
                    "kernel {index} ({}) writes {out} over its input {read}",
                    kernel.name()
                ),
            );
        }
    }
    verify_launches(manifest, target, program, executable)
}

fn verify_image(manifest: &Manifest, image: &Image) -> Check {
    if image.entry.is_empty()
        || !image
            .entry
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_')
    {
        return fail("", format!("entry {:?} is no identifier", image.entry));
    }
    if image.block_threads == 0 || image.block_threads > MAX_BLOCK_THREADS {
        return fail("", format!("block_threads is {}", image.block_threads));
    }
    for path in image.cubin.iter().chain([&image.source]) {
        if !manifest.files.contains_key(path) {
            return fail("", format!("{path:?} is not listed in files"));
        }
    }
    Ok(())
}

fn verify_copies(target: &Target) -> Check {
    match &target.copy_blocks {
        Some(launch) if launch.image as usize >= target.images.len() => {
            fail("", format!("image {} does not exist", launch.image))
        }
        Some(launch) if launch.grid_x == 0 || launch.grid_x > MAX_GRID_X => {
            fail("", format!("grid_x is {}", launch.grid_x))
        }
        None if !target.images.is_empty() => fail("", "a target with images has one"),
        Some(_) | None => Ok(()),
    }
}

fn verify_launches(
    manifest: &Manifest,
    target: &Target,
    program: &Program,
    executable: &Executable,
) -> Check {
    if executable.launches.len() > MAX_ITEMS {
        return fail("", format!("more than {MAX_ITEMS} launches"));
    }
    if executable.launches.is_empty() != target.images.is_empty() {
        return fail("", "images and launches come together or not at all");
    }
    let weights = program.weight_uses(manifest)?;
    let mut last = 0;
    for (index, launch) in executable.launches.iter().enumerate() {
        let place = format!("launch {index}");
        if launch.image as usize >= target.images.len() {
            return fail(&place, format!("image {} does not exist", launch.image));
        }
        if launch.kernel as usize >= program.kernels.len() || launch.kernel < last {
            return fail(
                &place,
                format!("kernel {} does not exist or comes too late", launch.kernel),
            );
        }
        last = launch.kernel;
        let [x, y, z] = launch.grid;
        if x == 0 || y == 0 || z == 0 || x > MAX_GRID_X || y.max(z) > MAX_GRID_YZ {
            return fail(&place, format!("grid is {x} x {y} x {z}"));
        }
        for argument in &launch.arguments {
            match argument {
                Argument::Buffer(id) => drop(buffer(program, *id)?),
                Argument::Weight(name) if !weights.contains_key(name) => {
                    return fail(&place, format!("no kernel of the program uses {name:?}"));
                }
                Argument::KvLayer(layer) => verify_layer(manifest, *layer)?,
                Argument::Workspace { offset_bytes }
                    if *offset_bytes >= executable.workspace_bytes =>
                {
                    return fail(&place, format!("workspace has no byte {offset_bytes}"));
                }
                Argument::Step
                | Argument::Weight(_)
                | Argument::Workspace { .. }
                | Argument::Counters => {}
            }
        }
    }
    Ok(())
}

impl Program {
    /// Every tensor of the weight file that the program uses, by name, and as what.
    ///
    /// # Errors
    /// A tensor that two kernels use as different things.
    pub fn weight_uses(
        &self,
        manifest: &Manifest,
    ) -> Result<BTreeMap<String, WeightRole>, ManifestError> {
        let mut uses = Uses(BTreeMap::new());
        for kernel in &self.kernels {
            match kernel {
                KernelSpec::Embed {
                    tokens,
                    positions,
                    position_offset,
                    out,
                } => {
                    let width = buffer(self, *out)?.width as usize;
                    let vocab = manifest.model.vocab_size as usize;
                    uses.add(tokens, WeightRole::Packed { n: vocab, k: width })?;
                    let min_rows = manifest.limits.max_seq_len as usize + *position_offset as usize;
                    uses.add(positions, WeightRole::Table { min_rows, width })?;
                }
                KernelSpec::Linear(linear) | KernelSpec::Qkv { linear, .. } => {
                    let (n, k) = (linear.out_features as usize, linear.in_features as usize);
                    uses.add(&Some(linear.weight.clone()), WeightRole::Packed { n, k })?;
                    uses.add(&linear.bias, WeightRole::Vector { len: n })?;
                    uses.add_norm(&linear.norm, k)?;
                    if let Some(residual) = &linear.residual {
                        uses.add_norm(&residual.norm, n)?;
                    }
                }
                KernelSpec::Attention { .. } | KernelSpec::Sample { .. } => {}
            }
        }
        for tap in &self.hidden_states {
            uses.add_norm(&tap.norm, manifest.model.hidden_size as usize)?;
        }
        Ok(uses.0)
    }
}

struct Uses(BTreeMap<String, WeightRole>);

impl Uses {
    fn add(&mut self, name: &Option<String>, role: WeightRole) -> Check {
        let Some(name) = name else { return Ok(()) };
        match self.0.get(name) {
            Some(other) if *other != role => {
                fail(name, format!("it is used as {other:?} and as {role:?}"))
            }
            _ => {
                self.0.insert(name.clone(), role);
                Ok(())
            }
        }
    }

    fn add_norm(&mut self, norm: &Option<Norm>, len: usize) -> Check {
        let Some(norm) = norm else { return Ok(()) };
        self.add(&norm.weight, WeightRole::Vector { len })?;
        self.add(&norm.bias, WeightRole::Vector { len })
    }
}
