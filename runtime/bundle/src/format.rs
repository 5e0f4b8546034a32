//! How the elements of weight matrices are stored: as floating-point numbers, or as integers with a
//! scale for each group of inputs.

use crate::{DType, packing::Layout};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Inputs that share a scale: a multiple of [`GroupSize::STEP`], at most [`GroupSize::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupSize(u32);

impl GroupSize {
    /// Sizes are multiples of this, and it is the smallest.
    pub const STEP: u32 = 32;
    /// The largest: in int4 its codes take half of a small L1 cache.
    pub const MAX: u32 = 1024;

    /// A size, if it is one.
    pub const fn new(inputs: u32) -> Option<GroupSize> {
        match inputs >= GroupSize::STEP
            && inputs <= GroupSize::MAX
            && inputs.is_multiple_of(GroupSize::STEP)
        {
            true => Some(GroupSize(inputs)),
            false => None,
        }
    }

    /// Inputs.
    pub const fn inputs(self) -> usize {
        self.0 as usize
    }
}

/// Matrices as integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IntFormat {
    /// `W = scale * q` with q from -127 to 127; a checkpoint's own codes may be -128.
    Int8 {
        /// Inputs that share a scale; all inputs of an output where absent.
        group: Option<GroupSize>,
    },
    /// `W = scale * q + minimum` with q from 0 to 15.
    Int4 {
        /// Inputs that share a scale and a minimum.
        group: GroupSize,
    },
}

impl IntFormat {
    /// Inputs of a group in a matrix of `k` inputs; the last group may have fewer.
    pub fn group(self, k: usize) -> usize {
        match self {
            IntFormat::Int8 { group: None } => k,
            IntFormat::Int8 { group: Some(group) } | IntFormat::Int4 { group } => {
                group.inputs().min(k)
            }
        }
    }

    /// Groups of an output.
    pub fn groups(self, k: usize) -> usize {
        k.div_ceil(self.group(k).max(1))
    }

    /// Whether groups have a minimum besides their scale.
    pub const fn has_minimum(self) -> bool {
        matches!(self, IntFormat::Int4 { .. })
    }

    /// The smallest and the largest code.
    pub const fn codes(self) -> (i8, i8) {
        match self {
            IntFormat::Int8 { .. } => (-127, 127),
            IntFormat::Int4 { .. } => (0, 15),
        }
    }
}

/// How the elements of a matrix are stored. Written as `bf16`, `int8`, `int8:g64`, `int4:g64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum WeightFormat {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper 16 bits of binary32.
    Bf16,
    /// Integers.
    Int(IntFormat),
}

/// What a CPU rounds rows of activations to before a product with weights of the same kind of numbers,
/// where that is less than they have: half of the bits, and with them less work where the processor has
/// dot products of such numbers. With either, attention rounds queries, and what values are weighted with, to bf16 beside
/// a KV cache of bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// bf16, for products with weights of bf16.
    Bf16,
    /// Integers of 8 bits with a scale for each 128 inputs of a row, for products with integers.
    Int8,
}

impl Activations {
    /// The spelling in flags and manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Activations::Bf16 => "bf16",
            Activations::Int8 => "int8",
        }
    }

    /// Whether products with such weights take rows that are rounded so.
    pub const fn suit(self, weights: WeightFormat) -> bool {
        match self {
            Activations::Bf16 => matches!(weights, WeightFormat::Bf16),
            Activations::Int8 => matches!(weights, WeightFormat::Int(_)),
        }
    }
}

/// The group of `int4` alone. With a scale and a minimum that is 4.5 bits a weight, what symmetric
/// groups of 32 take; the error is smaller, and a kernel ends half as many groups.
const INT4_GROUP: GroupSize = GroupSize(64);

impl WeightFormat {
    /// Elements of a floating-point type; none for other types.
    pub const fn of(dtype: DType) -> Option<WeightFormat> {
        match dtype {
            DType::F32 => Some(WeightFormat::F32),
            DType::F16 => Some(WeightFormat::F16),
            DType::Bf16 => Some(WeightFormat::Bf16),
            DType::I32 | DType::U8 => None,
        }
    }

    /// Type of the stored elements; integers are stored as bytes.
    pub const fn element(self) -> DType {
        match self {
            WeightFormat::F32 => DType::F32,
            WeightFormat::F16 => DType::F16,
            WeightFormat::Bf16 => DType::Bf16,
            WeightFormat::Int(_) => DType::U8,
        }
    }

    /// The integers, if it is of integers.
    pub const fn int(self) -> Option<IntFormat> {
        match self {
            WeightFormat::Int(format) => Some(format),
            _ => None,
        }
    }

    /// Shape of the stored form of an (N, K) matrix.
    pub fn shape(self, layout: Layout, n: usize, k: usize) -> Vec<usize> {
        match self {
            WeightFormat::Int(format) => match layout {
                Layout::Panels => format.packed_shape(n, k).to_vec(),
                Layout::Tiles => format.strips_shape(n, k).to_vec(),
            },
            float => layout.shape(float.element(), n, k),
        }
    }

    /// Bytes of the stored form of an (N, K) matrix.
    pub fn bytes(self, layout: Layout, n: usize, k: usize) -> u64 {
        let elements: u64 = self
            .shape(layout, n, k)
            .iter()
            .map(|&dim| dim as u64)
            .product();
        elements * self.element().size_bytes() as u64
    }
}

impl fmt::Display for IntFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IntFormat::Int8 { group: None } => write!(f, "int8"),
            IntFormat::Int8 { group: Some(group) } => write!(f, "int8:g{}", group.0),
            IntFormat::Int4 { group } => write!(f, "int4:g{}", group.0),
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightFormat::Int(format) => format.fmt(f),
            float => f.write_str(float.element().name()),
        }
    }
}

/// A text that is no [`WeightFormat`]: the caller's mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownFormat {
    /// No such name.
    #[error(
        "unknown weight format {0:?}; known are f32, f16, bf16, int8, int8:gN, int4 and int4:gN"
    )]
    Name(String),
    /// A group of no use.
    #[error(
        "the group in {0:?} must be a multiple of {step} from {step} to {max}, such as g64",
        step = GroupSize::STEP, max = GroupSize::MAX
    )]
    Group(String),
}

impl FromStr for WeightFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<WeightFormat, UnknownFormat> {
        let (name, group) = match text.split_once(':') {
            None => (text, None),
            Some((name, group)) => {
                let inputs = group.strip_prefix('g').and_then(|size| size.parse().ok());
                let group = inputs.and_then(GroupSize::new);
                let group = group.ok_or_else(|| UnknownFormat::Group(text.to_owned()))?;
                (name, Some(group))
            }
        };
        match (name, group) {
            ("f32", None) => Ok(WeightFormat::F32),
            ("f16", None) => Ok(WeightFormat::F16),
            ("bf16", None) => Ok(WeightFormat::Bf16),
            ("int8", group) => Ok(WeightFormat::Int(IntFormat::Int8 { group })),
            ("int4", group) => Ok(WeightFormat::Int(IntFormat::Int4 {
                group: group.unwrap_or(INT4_GROUP),
            })),
            _ => Err(UnknownFormat::Name(text.to_owned())),
        }
    }
}

impl TryFrom<String> for WeightFormat {
    type Error = UnknownFormat;

    fn try_from(text: String) -> Result<WeightFormat, UnknownFormat> {
        text.parse()
    }
}

impl From<WeightFormat> for String {
    fn from(format: WeightFormat) -> String {
        format.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_spelled() {
        for text in [
            "f32",
            "f16",
            "bf16",
            "int8",
            "int8:g32",
            "int8:g1024",
            "int4:g128",
        ] {
            let format: WeightFormat = text.parse().unwrap();
            assert_eq!(format.to_string(), text);
        }
        let short: WeightFormat = "int4".parse().unwrap();
        assert_eq!(short.to_string(), "int4:g64");
    }

    #[test]
    fn what_is_no_format_is_refused() {
        for text in ["", "i32", "int3", "f16:g32", "int2:g32", "INT8"] {
            let error = text.parse::<WeightFormat>().unwrap_err();
            assert_eq!(error, UnknownFormat::Name(text.to_owned()));
        }
        let wrong_groups = [
            "int4:", "int4:g", "int4:32", "int8:g0", "int4:g16", "int4:g33",
        ];
        for text in wrong_groups.into_iter().chain([
            "int4:g2048",
            "int4:g-32",
            "int4:g99999999999",
            "int8:g32:g32",
        ]) {
            let error = text.parse::<WeightFormat>().unwrap_err();
            assert_eq!(error, UnknownFormat::Group(text.to_owned()));
        }
    }

    #[test]
    fn a_group_is_no_longer_than_its_matrix() {
        let format = IntFormat::Int4 { group: INT4_GROUP };
        assert_eq!((format.group(40), format.groups(40)), (40, 1));
        assert_eq!((format.group(130), format.groups(130)), (64, 3));
        let whole = IntFormat::Int8 { group: None };
        assert_eq!((whole.group(130), whole.groups(130)), (130, 1));
    }
}
