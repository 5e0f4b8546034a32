//! KernelSpecs to launches: which kernel computes what, with which tiles, over which blocks.
//!
//! Kernels are shared: the layers of a model, and most of its buckets, differ in arguments and grids
//! alone. What a kernel's source depends on is the shape of its weights, the element type, and a
//! coarse bound on its rows.

use super::emit::{
    self, Added, AttentionDecodeText, AttentionPrefillText, CopyBlocksText, EmbedText, Epilogue,
    GemmText, Input, LinearText, NormText, Output, RowsText, SampleText, Weights, element, number,
};
use kiln_bundle::{
    Argument, BLOCK_TOKENS, Bounds, BufferId, COPIES_PER_LAUNCH, CopyLaunch, DType, KernelSpec,
    Launch, Linear, ModelInfo, Norm, Phase, Program, Residual, RowKind, Rows, TILE_QUERIES,
    WeightFormat, kv_layer_bytes,
    packing::{TILE_K, TILE_N},
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

/// Threads of a block of the kernels that work on rows: `THREADS` in `rows.cuh`.
const THREADS: u32 = 256;
/// Parts that K is cut into: `SEGMENTS` in `linear.cuh`.
const SEGMENTS: u32 = THREADS / 32;
/// Threads of a block that samples: `SAMPLE_THREADS` in `sampling.cuh`.
const SAMPLE_THREADS: u32 = 512;
/// Positions that a warp attends to at a time: `CHUNK` in `attention.cuh`.
const CHUNK: u32 = 64;
/// Most shared memory of a block, which all targets have.
const SMEM_BYTES: u32 = 96 << 10;
/// Most rows of f32 that each block prepares for itself, and most shared memory that they take.
const STAGED_ROWS: u32 = 8;
const STAGED_BYTES: u32 = 80 << 10;
/// Most rows of the kernel for few rows. Above it, weights are read once for a whole block of rows.
const FEW_ROWS: u32 = 64;
/// Row bounds of the kernels for few rows.
const ROW_BOUNDS: [u32; 5] = [1, 8, 16, 32, FEW_ROWS];
/// Blocks that fill a large GPU twice over: 132 multiprocessors.
const FULL_GRID: u32 = 264;
/// Fewest blocks that keep it busy.
const BUSY_GRID: u32 = 200;
/// Weight vectors that a lane has under way: with two blocks of 256 threads a multiprocessor, 64 KiB.
const WEIGHTS_IN_FLIGHT: u32 = 8;
/// The same where several tiles of rows take their share of the registers.
const WEIGHTS_IN_FLIGHT_MANY: u32 = 4;
/// Vectors of 16 bytes that a thread has under way where blocks are copied.
const COPIES_IN_FLIGHT: u64 = 4;
/// Alignment of what lies in the workspace.
const WORKSPACE_ALIGN_BYTES: u64 = 256;

/// A model that the kernels cannot run.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    /// A shape outside of what the templates cover.
    #[error("the CUDA targets cannot run this model: {what} is {found}; {needed}")]
    Shape {
        /// The dimension.
        what: &'static str,
        /// Its value.
        found: u32,
        /// What the kernels need.
        needed: &'static str,
    },
    /// An element type that the tensor cores do not take.
    #[error("the CUDA targets compute in f16 or bf16, not in {0}")]
    DType(DType),
    /// A template that does not render: the compiler's mistake.
    #[error("a template failed: {0}")]
    Template(#[from] askama::Error),
}

/// A kernel's source, and how a block of it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its entry point.
    pub entry: String,
    /// CUDA, to be compiled with [`emit::HEADERS`].
    pub source: String,
    /// Threads of a block.
    pub block_threads: u32,
    /// Dynamic shared memory of a block.
    pub dynamic_smem_bytes: u32,
}

/// The kernels of a target, each once.
#[derive(Debug, Default)]
pub struct Kernels {
    kernels: Vec<Kernel>,
    by_entry: HashMap<String, usize>,
}

impl Kernels {
    /// In the order in which they were first used.
    pub fn into_vec(self) -> Vec<Kernel> {
        self.kernels
    }

    /// The index of a kernel, and the kernel with its final entry point: two sources that would
    /// share a name are told apart by a number.
    fn add(
        &mut self,
        name: &str,
        threads: u32,
        smem: u32,
        render: impl Fn(&str) -> Result<String, askama::Error>,
    ) -> Result<u32, LowerError> {
        for attempt in 1.. {
            let entry = match attempt {
                1 => name.to_owned(),
                _ => format!("{name}_{attempt}"),
            };
            let kernel = Kernel {
                source: render(&entry)?,
                entry: entry.clone(),
                block_threads: threads,
                dynamic_smem_bytes: smem,
            };
            match self.by_entry.get(&entry) {
                Some(&index) if self.kernels[index] == kernel => return Ok(index as u32),
                Some(_) => {}
                None => {
                    self.by_entry.insert(entry, self.kernels.len());
                    self.kernels.push(kernel);
                    return Ok(self.kernels.len() as u32 - 1);
                }
            }
        }
        unreachable!("there are more numbers than kernels")
    }
}

/// How a target's matrices are stored.
#[derive(Clone, Debug)]
pub struct Formats {
    /// All but the exceptions.
    pub weights: WeightFormat,
    /// By name.
    pub exceptions: BTreeMap<String, WeightFormat>,
}

impl Formats {
    fn of(&self, matrix: &str, inputs: &'static str) -> Weights {
        Weights {
            format: *self.exceptions.get(matrix).unwrap_or(&self.weights),
            inputs,
        }
    }
}

/// How an executable runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launches {
    /// In order.
    pub launches: Vec<Launch>,
    /// Bytes of their workspace.
    pub workspace_bytes: u64,
    /// Words of their counters.
    pub counters: u32,
}

/// Whether the kernels can run a model.
///
/// # Errors
/// [`LowerError::Shape`] and [`LowerError::DType`].
pub fn check(model: &ModelInfo, dtype: DType, programs: &[Program]) -> Result<(), LowerError> {
    if !matches!(dtype, DType::F16 | DType::Bf16) {
        return Err(LowerError::DType(dtype));
    }
    let head_dim = model.head_dim;
    if !head_dim.is_multiple_of(16) || head_dim > 128 {
        return Err(LowerError::Shape {
            what: "head_dim",
            found: head_dim,
            needed: "it must be a multiple of 16, up to 128",
        });
    }
    let linears = programs
        .iter()
        .flat_map(|program| program.kernels.iter().filter_map(KernelSpec::linear));
    for linear in linears {
        let found = linear.in_features;
        if !found.is_multiple_of(8) {
            return Err(LowerError::Shape {
                what: "a layer's width",
                found,
                needed: "it must be a multiple of 8",
            });
        }
    }
    Ok(())
}

/// The launches of an executable of `phase` within `bounds`; its kernels join `kernels`.
///
/// # Errors
/// [`LowerError::Template`].
pub fn lower(
    program: &Program,
    phase: Phase,
    bounds: &Bounds,
    model: &ModelInfo,
    dtype: DType,
    formats: &Formats,
    kernels: &mut Kernels,
) -> Result<Launches, LowerError> {
    let mut lowering = Lowering {
        program,
        phase,
        bounds,
        model,
        element: element(dtype),
        element_bytes: dtype.size_bytes() as u64,
        formats,
        kernels,
        spec: 0,
        launches: vec![],
        kept_bytes: 0,
        temporary_bytes: 0,
        workspace_bytes: 0,
        counters: 0,
        best: None,
    };
    lowering.reserve_best();
    for (index, kernel) in (0..).zip(&program.kernels) {
        lowering.spec = index;
        lowering.temporary_bytes = lowering.kept_bytes;
        lowering.kernel(kernel)?;
    }
    Ok(Launches {
        launches: lowering.launches,
        workspace_bytes: lowering.workspace_bytes,
        counters: lowering.counters,
    })
}

/// The launch that copies blocks of the KV cache; its kernel joins `kernels`.
///
/// # Errors
/// [`LowerError::Template`].
pub fn copy_blocks(
    model: &ModelInfo,
    dtype: DType,
    kernels: &mut Kernels,
) -> Result<CopyLaunch, LowerError> {
    let layer_bytes = kv_layer_bytes(u64::from(model.hidden_size), dtype.size_bytes() as u64);
    let vectors = u64::from(model.layers) * layer_bytes / 16;
    let name = format!("copy_blocks_{vectors}");
    let image = kernels.add(&name, THREADS, 0, |entry| {
        emit::render(&CopyBlocksText {
            entry,
            vectors,
            depth: COPIES_IN_FLIGHT,
            copies: COPIES_PER_LAUNCH,
        })
    })?;
    let grid_x = vectors.div_ceil(u64::from(THREADS) * COPIES_IN_FLIGHT);
    Ok(CopyLaunch {
        image,
        // Dimensions of a model are below 2^24, and its layers few.
        grid_x: u32::try_from(grid_x).unwrap_or(u32::MAX),
    })
}

/// A kernel's parameters and what they are bound to, which can only be given together.
#[derive(Default)]
struct Parameters {
    text: Vec<String>,
    arguments: Vec<Argument>,
}

impl Parameters {
    fn new() -> Parameters {
        Parameters {
            text: vec!["Step step".to_owned()],
            arguments: vec![Argument::Step],
        }
    }

    fn add(&mut self, text: impl Into<String>, argument: Argument) {
        self.text.push(text.into());
        self.arguments.push(argument);
    }

    fn weight(&mut self, text: &str, name: &str) {
        self.add(text, Argument::Weight(name.to_owned()));
    }

    /// The weights of a norm.
    fn norm(&mut self, prefix: &str, norm: &Norm) {
        for (part, name) in [("weight", &norm.weight), ("bias", &norm.bias)] {
            if let Some(name) = name {
                self.weight(&format!("const float* __restrict__ {prefix}_{part}"), name);
            }
        }
    }

    /// The parameter list, broken where a person would.
    fn list(&self) -> String {
        let mut list = String::new();
        let mut width = 0;
        for (index, text) in self.text.iter().enumerate() {
            if index > 0 {
                list.push(',');
                if width + text.len() > 90 {
                    list.push_str("\n    ");
                    width = 0;
                } else {
                    list.push(' ');
                }
            }
            list.push_str(text);
            width += text.len() + 2;
        }
        list
    }
}

/// Blocks of the LM head that leave their best token, and where.
#[derive(Clone, Copy)]
struct Best {
    blocks: u32,
    offset_bytes: u64,
}

struct Lowering<'a> {
    program: &'a Program,
    phase: Phase,
    bounds: &'a Bounds,
    model: &'a ModelInfo,
    element: &'static str,
    element_bytes: u64,
    formats: &'a Formats,
    kernels: &'a mut Kernels,
    /// Index of the KernelSpec at hand.
    spec: u32,
    launches: Vec<Launch>,
    /// Workspace that lives through the step.
    kept_bytes: u64,
    /// End of the workspace that the KernelSpec at hand has taken.
    temporary_bytes: u64,
    workspace_bytes: u64,
    counters: u32,
    best: Option<Best>,
}

/// Tiles of a linear with few rows.
struct FewRows {
    rows: u32,
    tiles: u32,
    depth: u32,
    blocks: u32,
}

impl FewRows {
    /// The shape of tiles decides how fast, never what: every shape sums in the same order. Where
    /// lanes search together for the best of their outputs, their number is a power of two.
    fn new(rows: u32, linear: &Linear, weights: &Weights, search: bool) -> FewRows {
        let (k, n) = (linear.in_features, linear.out_features);
        let bound = ROW_BOUNDS.into_iter().find(|&bound| rows <= bound);
        let rows = bound.unwrap_or(FEW_ROWS);
        let row_tiles = rows.div_ceil(16);
        let n_tiles = n.div_ceil(TILE_N as u32);
        // Time goes by whole waves of blocks; of equals, larger blocks share more.
        let waves = |tiles: u32| n_tiles.div_ceil(tiles).div_ceil(FULL_GRID) * tiles;
        let tiles = (2..=4)
            .filter(|&tiles| !(search && tiles == 3))
            .filter(|&tiles| tiles * row_tiles <= 8 && n_tiles.div_ceil(tiles) >= BUSY_GRID)
            .chain([1])
            .min_by_key(|&tiles| (waves(tiles), Reverse(tiles)))
            .unwrap_or(1);
        let segment = k.div_ceil(weights.span_inputs()).div_ceil(SEGMENTS);
        let in_flight = match row_tiles {
            1 => WEIGHTS_IN_FLIGHT,
            _ => WEIGHTS_IN_FLIGHT_MANY,
        };
        FewRows {
            rows,
            tiles,
            depth: (in_flight / tiles).min(segment),
            blocks: n_tiles.div_ceil(tiles),
        }
    }
}

/// Tiles of a linear with many rows.
struct ManyRows {
    m_block: u32,
    n_block: u32,
    warp_m: u32,
    warp_n: u32,
    stages: u32,
    blocks_per_sm: u32,
}

impl ManyRows {
    const LARGE: ManyRows = ManyRows {
        m_block: 128,
        n_block: 128,
        warp_m: 64,
        warp_n: 32,
        stages: 4,
        blocks_per_sm: 1,
    };
    const SMALL: ManyRows = ManyRows {
        m_block: 64,
        n_block: 64,
        warp_m: 32,
        warp_n: 16,
        stages: 4,
        blocks_per_sm: 2,
    };

    /// Large tiles reuse more of what they load, as long as they fill the GPU.
    fn new(rows: u32, n: u32) -> &'static ManyRows {
        let large = &ManyRows::LARGE;
        if rows.div_ceil(large.m_block) * n.div_ceil(large.n_block) >= FULL_GRID / 2 {
            large
        } else {
            &ManyRows::SMALL
        }
    }

    /// A ring of tiles of rows, and one of the spans of weights that as many tiles may touch.
    fn smem_bytes(&self, weights: &Weights) -> u32 {
        let span = weights.span_inputs() / TILE_K as u32;
        let spans = (self.stages + span - 2) / span + 1;
        (self.stages * self.m_block + spans * self.n_block) * TILE_K as u32 * 2
    }
}

impl Lowering<'_> {
    fn kernel(&mut self, kernel: &KernelSpec) -> Result<(), LowerError> {
        match kernel {
            KernelSpec::Embed {
                tokens,
                positions,
                position_offset,
                out,
            } => self.embed(tokens.as_ref(), positions.as_ref(), *position_offset, *out),
            KernelSpec::Linear(linear) => {
                let output = match self.best {
                    Some(_) if linear.out == self.program.logits => Output::Logits,
                    _ if self.is_f32(linear.out) => Output::F32,
                    _ => Output::Element,
                };
                self.linear(linear, output, None)
            }
            KernelSpec::Qkv { linear, layer } => {
                let output = Output::Qkv {
                    hidden_size: self.model.hidden_size,
                    head_dim: self.model.head_dim,
                    block_stride: self.block_stride(),
                };
                self.linear(linear, output, Some(*layer))
            }
            KernelSpec::Attention {
                q,
                layer,
                scale,
                out,
                ..
            } => match self.phase {
                Phase::Decode => self.attention_decode(*q, *layer, *scale, *out),
                Phase::Prefill => self.attention_prefill(*q, *layer, *scale, *out),
            },
            KernelSpec::Sample { logits } => self.sample(*logits),
        }
    }

    /// Decides whether the LM head leaves the best token of each block, before anything else takes
    /// workspace: it lives until the tokens are chosen.
    fn reserve_best(&mut self) {
        let logits = self.program.logits;
        let head = self.program.kernels.iter().find_map(|kernel| match kernel {
            KernelSpec::Linear(linear) if linear.out == logits => Some(linear),
            _ => None,
        });
        let rows = self.bounds.max_logit_rows;
        if let Some(head) = head
            && rows <= FEW_ROWS
        {
            let weights = self.formats.of(&head.weight, "K");
            let blocks = FewRows::new(rows, head, &weights, true).blocks;
            let bytes = u64::from(rows) * u64::from(blocks) * 8;
            let offset_bytes = self.temporary(bytes);
            self.kept_bytes = self.temporary_bytes;
            self.best = Some(Best {
                blocks,
                offset_bytes,
            });
        }
    }

    /// Workspace for the KernelSpec at hand.
    fn temporary(&mut self, bytes: u64) -> u64 {
        let offset = self.temporary_bytes;
        self.temporary_bytes = offset + bytes.max(1).next_multiple_of(WORKSPACE_ALIGN_BYTES);
        self.workspace_bytes = self.workspace_bytes.max(self.temporary_bytes);
        offset
    }

    /// Elements between blocks of the KV cache.
    fn block_stride(&self) -> u64 {
        2 * u64::from(self.model.layers) * u64::from(self.model.hidden_size) * BLOCK_TOKENS as u64
    }

    fn is_f32(&self, buffer: BufferId) -> bool {
        self.program.buffers[buffer.0 as usize].dtype == DType::F32
    }

    fn type_of(&self, buffer: BufferId) -> &'static str {
        if self.is_f32(buffer) { "float" } else { "T" }
    }

    fn row_kind(&self, buffer: BufferId) -> RowKind {
        self.program.buffers[buffer.0 as usize].rows
    }

    fn launch(&mut self, image: u32, grid: [u32; 3], parameters: Parameters) {
        self.launches.push(Launch {
            kernel: self.spec,
            image,
            grid,
            arguments: parameters.arguments,
        });
    }

    fn embed(
        &mut self,
        tokens: Option<&String>,
        positions: Option<&String>,
        position_offset: u32,
        out: BufferId,
    ) -> Result<(), LowerError> {
        let width = self.program.buffers[out.0 as usize].width;
        let out_type = self.type_of(out);
        let weights = tokens.map(|name| self.formats.of(name, "WIDTH"));
        let mut parameters = Parameters::new();
        let mut parts = vec![];
        if let Some(name) = tokens {
            parameters.weight("const uint4* __restrict__ tokens", name);
            parts.push("tokens");
        }
        if let Some(name) = positions {
            parameters.weight("const T* __restrict__ positions", name);
            parts.push("positions");
        }
        parameters.add(
            format!("{out_type}* __restrict__ out"),
            Argument::Buffer(out),
        );
        let format = weights.map_or_else(String::new, |weights| weights.suffix());
        let name = format!("embed_{}_{width}{format}_{}", parts.join("_"), self.element);
        let (list, element) = (parameters.list(), self.element);
        let summary = format!("out (T, {width}) = embedding of {}.", parts.join(" + "));
        let image = self.kernels.add(&name, THREADS, 0, |entry| {
            emit::render(&EmbedText {
                entry,
                parameters: &list,
                summary: &summary,
                element,
                width,
                tokens: weights.as_ref(),
                positions: positions.is_some(),
                position_offset,
                out_type,
            })
        })?;
        self.launch(image, [self.bounds.max_tokens, 1, 1], parameters);
        Ok(())
    }

    fn linear(
        &mut self,
        linear: &Linear,
        output: Output,
        layer: Option<u32>,
    ) -> Result<(), LowerError> {
        let kind = self.row_kind(linear.out);
        let rows = self.bounds.rows(kind);
        let input = Input {
            f32: self.is_f32(linear.input),
            mapped: linear.rows == Rows::Logits,
            count: match kind {
                RowKind::Tokens => "tokens",
                RowKind::Logits => "logit_rows",
            },
            norm: linear.norm.as_ref().map(NormText::new),
        };
        if rows <= FEW_ROWS {
            self.few_rows(linear, rows, input, output, layer)
        } else {
            self.many_rows(linear, rows, input, output, layer)
        }
    }

    fn few_rows(
        &mut self,
        linear: &Linear,
        rows: u32,
        mut input: Input,
        output: Output,
        layer: Option<u32>,
    ) -> Result<(), LowerError> {
        let (k, n) = (linear.in_features, linear.out_features);
        let weights = self.formats.of(&linear.weight, "K");
        let tiles = FewRows::new(rows, linear, &weights, output == Output::Logits);
        let epilogue = epilogue(linear, output, true);
        // Each block prepares rows of f32 for itself while they are few; more than that are better
        // prepared once, by a kernel of their own.
        let mut source = Argument::Buffer(linear.input);
        let staged_bytes = k.next_multiple_of(weights.span_inputs()) * 2 * tiles.rows;
        let mut smem_bytes = 0;
        if input.f32 && tiles.rows <= STAGED_ROWS && staged_bytes <= STAGED_BYTES {
            smem_bytes = staged_bytes;
        } else if input.f32 {
            source = self.rows(&input, source, linear.norm.as_ref(), rows, k, "T")?;
            input = input.prepared();
        }
        let mut parameters = Parameters::new();
        parameters.weight("const uint4* __restrict__ weight", &linear.weight);
        let input_type = if input.f32 { "float" } else { "T" };
        parameters.add(format!("const {input_type}* input"), source);
        if let Some(norm) = linear.norm.as_ref().filter(|_| input.norm.is_some()) {
            parameters.norm("norm", norm);
        }
        let residual = linear.residual.as_ref();
        let buffer = residual.map(|residual| Argument::Buffer(residual.buffer));
        self.epilogue_parameters(&mut parameters, linear, &epilogue, buffer, layer);
        if let Some(Residual {
            norm: Some(norm), ..
        }) = residual
        {
            parameters.norm("residual_norm", norm);
        }
        if let (Output::Logits, Some(best)) = (&epilogue.output, self.best) {
            let offset_bytes = best.offset_bytes;
            parameters.add(
                "Candidate* __restrict__ best_of_block",
                Argument::Workspace { offset_bytes },
            );
        }
        let name = format!(
            "linear{}_{k}x{n}{}_r{}{}_{}",
            if input.norm.is_some() { "_norm" } else { "" },
            weights.suffix(),
            tiles.rows,
            suffix(&epilogue),
            self.element,
        );
        let summary = summary(&input, linear, &epilogue);
        let (list, element) = (parameters.list(), self.element);
        let image = self.kernels.add(&name, THREADS, smem_bytes, |entry| {
            emit::render(&LinearText {
                entry,
                parameters: &list,
                summary: &summary,
                element,
                k,
                n,
                rows: tiles.rows,
                tiles: tiles.tiles,
                depth: tiles.depth,
                weights: &weights,
                input: &input,
                epilogue: &epilogue,
            })
        })?;
        self.launch(image, [tiles.blocks, 1, 1], parameters);
        Ok(())
    }

    fn many_rows(
        &mut self,
        linear: &Linear,
        rows: u32,
        mut input: Input,
        output: Output,
        layer: Option<u32>,
    ) -> Result<(), LowerError> {
        let (k, n) = (linear.in_features, linear.out_features);
        let weights = self.formats.of(&linear.weight, "K");
        let tiles = ManyRows::new(rows, n);
        let epilogue = epilogue(linear, output, false);
        // Tensor cores take rows of the element type: norms and conversions come first.
        let mut source = Argument::Buffer(linear.input);
        if input.f32 || input.norm.is_some() {
            source = self.rows(&input, source, linear.norm.as_ref(), rows, k, "T")?;
            input = input.prepared();
        }
        let residual = match &linear.residual {
            None => None,
            Some(Residual { buffer, norm: None }) => Some(Argument::Buffer(*buffer)),
            Some(Residual {
                buffer,
                norm: Some(norm),
            }) => {
                let plain = Input {
                    f32: true,
                    mapped: linear.rows == Rows::Logits,
                    count: input.count,
                    norm: Some(NormText::new(norm)),
                };
                let buffer = Argument::Buffer(*buffer);
                Some(self.rows(&plain, buffer, Some(norm), rows, n, "float")?)
            }
        };
        let mut parameters = Parameters::new();
        parameters.weight("const uint4* __restrict__ weight", &linear.weight);
        parameters.add("const T* input", source);
        self.epilogue_parameters(&mut parameters, linear, &epilogue, residual, layer);
        let name = format!(
            "gemm_{k}x{n}{}_b{}x{}{}_{}",
            weights.suffix(),
            tiles.m_block,
            tiles.n_block,
            suffix(&epilogue),
            self.element,
        );
        let summary = summary(&input, linear, &epilogue);
        let (list, element) = (parameters.list(), self.element);
        let smem_bytes = tiles.smem_bytes(&weights);
        let image = self.kernels.add(&name, THREADS, smem_bytes, |entry| {
            emit::render(&GemmText {
                entry,
                parameters: &list,
                summary: &summary,
                element,
                k,
                n,
                m_block: tiles.m_block,
                n_block: tiles.n_block,
                warp_m: tiles.warp_m,
                warp_n: tiles.warp_n,
                stages: tiles.stages,
                blocks_per_sm: tiles.blocks_per_sm,
                weights: &weights,
                input: &input,
                epilogue: &epilogue,
            })
        })?;
        let grid = [rows.div_ceil(tiles.m_block), n.div_ceil(tiles.n_block), 1];
        self.launch(image, grid, parameters);
        Ok(())
    }

    /// Rows of f32 (M, `width`), normalised and converted into workspace.
    fn rows(
        &mut self,
        input: &Input,
        from: Argument,
        norm: Option<&Norm>,
        rows: u32,
        width: u32,
        out_type: &'static str,
    ) -> Result<Argument, LowerError> {
        let element_bytes = if out_type == "T" {
            self.element_bytes
        } else {
            DType::F32.size_bytes() as u64
        };
        let offset_bytes = self.temporary(u64::from(rows) * u64::from(width) * element_bytes);
        let to = Argument::Workspace { offset_bytes };
        let mut parameters = Parameters::new();
        parameters.add("const float* input", from);
        if let Some(norm) = norm {
            parameters.norm("norm", norm);
        }
        parameters.add(format!("{out_type}* __restrict__ out"), to.clone());
        let name = format!(
            "rows{}{}_{width}_{}_{}",
            if norm.is_some() { "_norm" } else { "" },
            if input.mapped { "_logits" } else { "" },
            if out_type == "T" { self.element } else { "f32" },
            input.count,
        );
        let verb = if norm.is_some() {
            "the input's rows, normalised"
        } else {
            "the input's rows"
        };
        let summary = format!("out (M, {width}) = {verb}.");
        let (list, element) = (parameters.list(), self.element);
        let image = self.kernels.add(&name, THREADS, 0, |entry| {
            emit::render(&RowsText {
                entry,
                parameters: &list,
                summary: &summary,
                element,
                width,
                input,
                norm: input.norm.as_ref(),
                out_type,
            })
        })?;
        self.launch(image, [rows, 1, 1], parameters);
        Ok(to)
    }

    fn epilogue_parameters(
        &self,
        parameters: &mut Parameters,
        linear: &Linear,
        epilogue: &Epilogue,
        residual: Option<Argument>,
        layer: Option<u32>,
    ) {
        if let Some(name) = &linear.bias {
            parameters.weight("const float* __restrict__ bias", name);
        }
        if let Some(argument) = residual {
            parameters.add("const float* residual", argument);
        }
        let out_type = match epilogue.output {
            Output::F32 | Output::Logits => "float",
            Output::Element | Output::Qkv { .. } => "T",
        };
        let out = format!("{out_type}* __restrict__ out");
        parameters.add(out, Argument::Buffer(linear.out));
        if let Some(layer) = layer {
            parameters.add("T* __restrict__ kv", Argument::KvLayer(layer));
        }
    }

    fn attention_decode(
        &mut self,
        q: BufferId,
        layer: u32,
        scale: f32,
        out: BufferId,
    ) -> Result<(), LowerError> {
        let (heads, head_dim) = (self.model.heads, self.model.head_dim);
        let sequences = self.bounds.max_sequences;
        // A warp a chunk, as many as have room for their keys and values.
        let chunk_bytes = 2 * CHUNK * head_dim * self.element_bytes as u32;
        let chunks = if 4 * chunk_bytes <= SMEM_BYTES * 2 / 3 {
            4
        } else {
            2
        };
        let groups = self.bounds.max_kv_len.div_ceil(CHUNK * chunks);
        let parts = u64::from(sequences) * u64::from(heads) * u64::from(groups * chunks);
        let offset_bytes = self.temporary(parts * u64::from(head_dim + 2) * 4);
        self.counters = self.counters.max(sequences * heads);
        let mut parameters = Parameters::new();
        parameters.add("const T* queries", Argument::Buffer(q));
        parameters.add("const T* kv", Argument::KvLayer(layer));
        parameters.add("T* __restrict__ out", Argument::Buffer(out));
        parameters.add("ChunkPart* workspace", Argument::Workspace { offset_bytes });
        parameters.add("uint32_t* counters", Argument::Counters);
        let name = format!("attention_decode_h{heads}_d{head_dim}_{}", self.element);
        let summary = format!(
            "out (B, {}) = attention of one new token a sequence over its cached positions.",
            heads * head_dim
        );
        let (list, element, block_stride) = (parameters.list(), self.element, self.block_stride());
        let image = self
            .kernels
            .add(&name, chunks * 32, chunks * chunk_bytes, |entry| {
                emit::render(&AttentionDecodeText {
                    entry,
                    parameters: &list,
                    summary: &summary,
                    element,
                    heads,
                    head_dim,
                    scale: number(scale),
                    chunks,
                    block_stride,
                })
            })?;
        self.launch(image, [heads, sequences, groups], parameters);
        Ok(())
    }

    fn attention_prefill(
        &mut self,
        q: BufferId,
        layer: u32,
        scale: f32,
        out: BufferId,
    ) -> Result<(), LowerError> {
        let (heads, head_dim) = (self.model.heads, self.model.head_dim);
        let mut parameters = Parameters::new();
        parameters.add("const T* queries", Argument::Buffer(q));
        parameters.add("const T* kv", Argument::KvLayer(layer));
        parameters.add("T* __restrict__ out", Argument::Buffer(out));
        let name = format!("attention_prefill_h{heads}_d{head_dim}_{}", self.element);
        let summary = format!(
            "out (T, {}) = causal attention of new tokens over their sequences' cached positions.",
            heads * head_dim
        );
        // Two stages of the keys and values of a chunk.
        let smem = (2 * 2 * CHUNK * head_dim) * self.element_bytes as u32;
        let (list, element, block_stride) = (parameters.list(), self.element, self.block_stride());
        let threads = TILE_QUERIES / 16 * 32;
        let image = self.kernels.add(&name, threads, smem, |entry| {
            emit::render(&AttentionPrefillText {
                entry,
                parameters: &list,
                summary: &summary,
                element,
                heads,
                head_dim,
                scale: number(scale),
                block_stride,
            })
        })?;
        let tiles = self.bounds.max_tokens / TILE_QUERIES + self.bounds.max_sequences;
        self.launch(image, [heads, tiles, 1], parameters);
        Ok(())
    }

    fn sample(&mut self, logits: BufferId) -> Result<(), LowerError> {
        let vocab_size = self.model.vocab_size;
        let mut parameters = Parameters::new();
        parameters.add("const float* logits", Argument::Buffer(logits));
        if let Some(Best { offset_bytes, .. }) = self.best {
            parameters.add(
                "const Candidate* best_of_block",
                Argument::Workspace { offset_bytes },
            );
        }
        let score_bytes = u64::from(self.bounds.max_sequences) * u64::from(vocab_size) * 4;
        let offset_bytes = self.temporary(score_bytes);
        parameters.add("float* scores", Argument::Workspace { offset_bytes });
        let blocks = self.best.map_or(0, |best| best.blocks);
        let name = match blocks {
            0 => format!("sample_{vocab_size}"),
            _ => format!("sample_{vocab_size}_of_{blocks}"),
        };
        let list = parameters.list();
        let image = self.kernels.add(&name, SAMPLE_THREADS, 0, |entry| {
            emit::render(&SampleText {
                entry,
                parameters: &list,
                summary: "Chooses the next token of each sequence from its row of logits.",
                vocab_size,
                blocks,
            })
        })?;
        self.launch(image, [self.bounds.max_sequences, 1, 1], parameters);
        Ok(())
    }
}

/// What happens to a linear's sums; `fused_norms` where the kernel normalises the residual itself.
fn epilogue(linear: &Linear, output: Output, fused_norms: bool) -> Epilogue {
    Epilogue {
        bias: linear.bias.is_some(),
        activation: linear.activation,
        residual: linear.residual.as_ref().map(|residual| {
            // What is normalised by a kernel of its own is put in order by it too.
            let fused = fused_norms || residual.norm.is_none();
            Added {
                mapped: linear.rows == Rows::Logits && fused,
                norm: residual.norm.as_ref().filter(|_| fused).map(NormText::new),
            }
        }),
        output,
    }
}

/// A short name of an epilogue.
fn suffix(epilogue: &Epilogue) -> String {
    let mut suffix = String::new();
    if epilogue.bias {
        suffix += "_bias";
    }
    if let Some(activation) = epilogue.activation {
        suffix.push('_');
        suffix += activation.name();
    }
    suffix += match &epilogue.residual {
        None => "",
        Some(Added { norm: None, .. }) => "_residual",
        Some(Added { norm: Some(_), .. }) => "_normresidual",
    };
    if epilogue.residual.as_ref().is_some_and(|added| added.mapped) {
        suffix += "_selected";
    }
    suffix += match epilogue.output {
        Output::F32 => "_f32",
        Output::Logits => "_logits",
        Output::Element => "",
        Output::Qkv { .. } => "_qkv",
    };
    suffix
}

/// What a linear computes, in a line.
fn summary(input: &Input, linear: &Linear, epilogue: &Epilogue) -> String {
    let (k, n) = (linear.in_features, linear.out_features);
    let normed = if input.norm.is_some() {
        "norm(input)"
    } else {
        "input"
    };
    format!(
        "{normed} (M, {k}) * weight ({n}, {k})^T, then: {}.",
        epilogue.summary()
    )
}
