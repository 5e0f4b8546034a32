//! The mapped weights, and where in them each kernel finds what it reads: names are looked up once, at loading.

use super::plan_error;
use crate::cpu::{self, Activation, PackedMatrix, PositionTable, Storage, StorageError};
use crate::device::DeviceError;
use kiln_bundle::packing::{PANEL, panels};
use kiln_bundle::{
    Activations, DType, KernelSpec, Linear, Norm, Program, Target, TensorView, WeightFile,
    WeightFormat,
};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The mapped weights of a target.
pub(super) struct Weights {
    file: WeightFile,
    /// What rows are rounded to.
    activations: Option<Activations>,
    programs: Vec<ProgramPlaces>,
}

/// Where a program's kernels find what they read.
struct ProgramPlaces {
    kernels: Vec<Places>,
    /// Of its hidden states.
    norms: Vec<Option<NormPlaces>>,
}

/// Where a kernel finds what it reads.
#[derive(Default)]
pub(super) struct Places {
    /// W of a linear layer, or the token table.
    matrix: Option<MatrixPlace>,
    positions: Option<VectorPlace>,
    bias: Option<VectorPlace>,
    norm: Option<NormPlaces>,
    residual_norm: Option<NormPlaces>,
}

/// Bytes of the file that are a matrix.
struct MatrixPlace {
    bytes: Range<usize>,
    format: WeightFormat,
    n: usize,
    k: usize,
}

/// Bytes of the file that are numbers of one type.
struct VectorPlace {
    bytes: Range<usize>,
    dtype: DType,
}

struct NormPlaces {
    weight: Option<VectorPlace>,
    bias: Option<VectorPlace>,
    eps: f32,
}

impl Weights {
    /// Looks up every tensor that the target's kernels read, so that none is missing in a step.
    ///
    /// # Errors
    /// [`DeviceError::Plan`] when one is missing or is not what it should be.
    pub(super) fn new(file: WeightFile, target: &Target) -> Result<Weights, DeviceError> {
        let lookup = Lookup {
            file: &file,
            target,
        };
        let programs = target.programs.iter();
        let programs = programs
            .map(|program| lookup.program(program))
            .collect::<Result<_, _>>()?;
        Ok(Weights {
            activations: target.activations,
            programs,
            file,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    /// What rows are rounded to.
    pub(super) fn activations(&self) -> Option<Activations> {
        self.activations
    }

    /// Of each kernel of a program.
    pub(super) fn kernels(&self, program: u32) -> &[Places] {
        &self.programs[program as usize].kernels
    }

    /// What is applied to a hidden state of a program.
    pub(super) fn hidden_state_norm(
        &self,
        program: u32,
        index: usize,
    ) -> Result<Option<cpu::Norm<'_>>, DeviceError> {
        self.norm(self.programs[program as usize].norms[index].as_ref())
    }

    /// All of a linear layer but its residual and its choice of rows.
    pub(super) fn linear(
        &self,
        linear: &Linear,
        places: &Places,
    ) -> Result<cpu::Linear<'_>, DeviceError> {
        let weight = self.matrix(places)?;
        Ok(cpu::Linear {
            bias: self.vector(places.bias.as_ref())?,
            norm: self.norm(places.norm.as_ref())?,
            activation: match linear.activation {
                None => Activation::None,
                Some(kiln_bundle::Activation::Relu) => Activation::Relu,
                Some(kiln_bundle::Activation::GeluNew) => Activation::GeluNew,
            },
            activations: self.activations,
            ..cpu::Linear::new(
                weight.ok_or_else(|| plan_error("a linear layer without weights".to_owned()))?,
            )
        })
    }

    /// What is applied to the residual of a linear layer.
    pub(super) fn residual_norm(
        &self,
        places: &Places,
    ) -> Result<Option<cpu::Norm<'_>>, DeviceError> {
        self.norm(places.residual_norm.as_ref())
    }

    /// The matrix of a linear layer, or the token table, whose rows are padded to whole panels.
    pub(super) fn matrix(&self, places: &Places) -> Result<Option<PackedMatrix<'_>>, DeviceError> {
        let view = |place: &MatrixPlace| {
            PackedMatrix::from_bytes(self.data(&place.bytes), place.format, place.n, place.k)
        };
        places
            .matrix
            .as_ref()
            .map(view)
            .transpose()
            .map_err(changed)
    }

    /// The position table, of rows of `width` values.
    pub(super) fn positions(
        &self,
        places: &Places,
        width: usize,
    ) -> Result<Option<PositionTable<'_>>, DeviceError> {
        let view = |place: &VectorPlace| {
            let values = Storage::new(self.data(&place.bytes), place.dtype)?;
            Ok(PositionTable::new(values, width))
        };
        places
            .positions
            .as_ref()
            .map(view)
            .transpose()
            .map_err(changed)
    }

    fn norm(&self, places: Option<&NormPlaces>) -> Result<Option<cpu::Norm<'_>>, DeviceError> {
        let Some(places) = places else {
            return Ok(None);
        };
        Ok(Some(cpu::Norm {
            weight: self.vector(places.weight.as_ref())?,
            bias: self.vector(places.bias.as_ref())?,
            eps: places.eps,
        }))
    }

    fn vector(&self, place: Option<&VectorPlace>) -> Result<Option<&[f32]>, DeviceError> {
        let Some(place) = place else { return Ok(None) };
        match Storage::new(self.data(&place.bytes), place.dtype).map_err(changed)? {
            Storage::F32(values) => Ok(Some(values)),
            _ => Err(plan_error("a vector that is not f32".to_owned())),
        }
    }

    fn data(&self, bytes: &Range<usize>) -> &[u8] {
        &self.file.data()[bytes.clone()]
    }

    /// Copies them into memory near the threads that read them in decode steps: each thread its share of
    /// the panels of each matrix, which [`cpu::linear`] gives it there.
    pub(super) fn copied_by(
        mut self,
        target: &Target,
        pool: &cpu::ThreadPool,
    ) -> io::Result<Weights> {
        let shares = self.shares(target, pool.threads());
        self.file = self.file.copied(|from, to| copy(from, to, &shares, pool))?;
        Ok(self)
    }

    /// Parts of the file, in its order, and the thread of each; what is in none is nobody's.
    pub(super) fn shares(&self, target: &Target, threads: usize) -> Vec<(Range<usize>, usize)> {
        let kernels = target.programs.iter().flat_map(|program| &program.kernels);
        let linears = kernels.filter_map(KernelSpec::linear);
        let matrices: BTreeMap<&str, usize> = linears
            .map(|linear| (linear.weight.as_str(), panels(linear.out_features as usize)))
            .collect();
        let mut shares = Vec::new();
        for (name, panels) in matrices {
            let Some(matrix) = self.file.range(name) else {
                continue;
            };
            let panel_bytes = matrix.len() / panels;
            for thread in 0..threads {
                let share = cpu::partition(panels, threads, thread);
                let at = |panel: usize| matrix.start + panel * panel_bytes;
                shares.push((at(share.start)..at(share.end), thread));
            }
        }
        shares.sort_unstable_by_key(|(range, _)| (range.start, range.end));
        shares
    }

    /// See [`WeightFile::lock`].
    pub(super) fn lock(&self) -> io::Result<()> {
        self.file.lock()
    }
}

/// Finds tensors by name.
struct Lookup<'a> {
    file: &'a WeightFile,
    target: &'a Target,
}

impl Lookup<'_> {
    fn program(&self, program: &Program) -> Result<ProgramPlaces, DeviceError> {
        let kernels = program.kernels.iter();
        let norms = program.hidden_states.iter();
        Ok(ProgramPlaces {
            kernels: kernels
                .map(|kernel| self.kernel(kernel, program))
                .collect::<Result<_, _>>()?,
            norms: norms
                .map(|tap| self.norm(tap.norm.as_ref()))
                .collect::<Result<_, _>>()?,
        })
    }

    fn kernel(&self, kernel: &KernelSpec, program: &Program) -> Result<Places, DeviceError> {
        if let KernelSpec::Embed {
            tokens,
            positions,
            out,
            ..
        } = kernel
        {
            let width = program.buffers[out.0 as usize].width as usize;
            return Ok(Places {
                matrix: tokens
                    .as_ref()
                    .map(|name| self.table(name, width))
                    .transpose()?,
                positions: positions
                    .as_ref()
                    .map(|name| self.numbers(name))
                    .transpose()?,
                ..Places::default()
            });
        }
        let Some(linear) = kernel.linear() else {
            return Ok(Places::default());
        };
        let (n, k) = (linear.out_features as usize, linear.in_features as usize);
        let residual = linear.residual.as_ref();
        Ok(Places {
            matrix: Some(self.matrix(&linear.weight, n, k)?),
            positions: None,
            bias: self.vector(linear.bias.as_ref())?,
            norm: self.norm(linear.norm.as_ref())?,
            residual_norm: self.norm(residual.and_then(|residual| residual.norm.as_ref()))?,
        })
    }

    fn tensor(&self, name: &str) -> Result<(Range<usize>, TensorView<'_>), DeviceError> {
        let found = self.file.range(name).zip(self.file.tensor(name));
        found.ok_or_else(|| plan_error(format!("tensor {name:?} is missing")))
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<MatrixPlace, DeviceError> {
        let format = *self
            .target
            .exceptions
            .get(name)
            .unwrap_or(&self.target.weights);
        let (bytes, tensor) = self.tensor(name)?;
        PackedMatrix::from_bytes(tensor.data, format, n, k).map_err(|e| malformed(name, &e))?;
        Ok(MatrixPlace {
            bytes,
            format,
            n,
            k,
        })
    }

    fn table(&self, name: &str, width: usize) -> Result<MatrixPlace, DeviceError> {
        let rows = self
            .tensor(name)?
            .1
            .shape
            .first()
            .map_or(0, |panels| panels * PANEL);
        self.matrix(name, rows, width)
    }

    fn numbers(&self, name: &str) -> Result<VectorPlace, DeviceError> {
        let (bytes, TensorView { data, dtype, .. }) = self.tensor(name)?;
        Storage::new(data, dtype).map_err(|e| malformed(name, &e))?;
        Ok(VectorPlace { bytes, dtype })
    }

    fn vector(&self, name: Option<&String>) -> Result<Option<VectorPlace>, DeviceError> {
        let Some(name) = name else { return Ok(None) };
        match self.numbers(name)? {
            place if place.dtype == DType::F32 => Ok(Some(place)),
            _ => Err(plan_error(format!("vector {name:?} is not f32"))),
        }
    }

    fn norm(&self, norm: Option<&Norm>) -> Result<Option<NormPlaces>, DeviceError> {
        let Some(norm) = norm else { return Ok(None) };
        Ok(Some(NormPlaces {
            weight: self.vector(norm.weight.as_ref())?,
            bias: self.vector(norm.bias.as_ref())?,
            eps: norm.eps,
        }))
    }
}

/// Copies all of a file, each share by its thread and what is in none by the first one.
fn copy(from: &[u8], to: &mut [u8], shares: &[(Range<usize>, usize)], pool: &cpu::ThreadPool) {
    type Pieces<'a> = Vec<(&'a [u8], &'a mut [u8])>;
    let mut pieces: Vec<Pieces<'_>> = (0..pool.threads()).map(|_| Vec::new()).collect();
    let mut rest = to;
    let mut done = 0;
    let end = (from.len()..from.len(), 0);
    for (range, thread) in shares.iter().chain([&end]) {
        for (range, thread) in [(done..range.start, 0), (range.clone(), *thread)] {
            let (piece, behind) = rest.split_at_mut(range.len());
            pieces[thread].push((&from[range], piece));
            rest = behind;
        }
        done = range.end;
    }
    let pieces: Vec<Mutex<Pieces<'_>>> = pieces.into_iter().map(Mutex::new).collect();
    pool.run(|thread| {
        let mut pieces = pieces[thread]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (from, to) in pieces.iter_mut() {
            to.copy_from_slice(from);
        }
    });
}

fn malformed(name: &str, error: &StorageError) -> DeviceError {
    plan_error(format!("tensor {name:?}: {error}"))
}

/// Not to be seen: the same was read at loading.
fn changed(error: StorageError) -> DeviceError {
    plan_error(format!("weights: {error}"))
}
