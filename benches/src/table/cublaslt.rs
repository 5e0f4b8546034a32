//! Matrix products by cuBLASLt, NVIDIA's library, which is loaded when it is asked for.
//!
//! They are timed as kiln's kernels are: by events between the launches of a graph.
//! Reference: <https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api>.

use super::error::TableError;
use super::kinds::Shape;
use super::references::{ROTATED_BYTES, References, WARM_UP};
use crate::table::{Reference, Times};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtMatmulDescAttributes_t, cublasLtMatmulDescOpaque_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayoutOpaque_t, cublasStatus_t,
    cudaDataType,
};
use fastrand::Rng;
use kiln_runtime::device::cuda::{DeviceAddress, Driver, DriverError, NvidiaDriver};
use std::{ffi::c_void, mem::MaybeUninit, ptr};

const NAME: &str = "cublaslt";
/// Memory for the library's own use: what NVIDIA advises for Hopper.
static WORKSPACE_BYTES: usize = 32 << 20;
/// Operands are made of copies of so many elements.
const PATTERN_ELEMENTS: usize = 1 << 20;
const ELEMENT_BYTES: usize = 2;
/// `CUBLAS_OP_T`, which the bindings lack.
static TRANSPOSED: i32 = 1;
const ELEMENT: cudaDataType = cudaDataType::CUDA_R_16F;

/// Whether the library is there.
///
/// # Errors
/// [`TableError::Reference`] with the names that were looked for.
pub fn check_library() -> Result<(), TableError> {
    // SAFETY: this loads the library, whose initialisers are trusted as the driver's are.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    let names = cudarc::get_lib_name_candidates("cublasLt").into_iter();
    let names: Vec<String> = names.filter(|name| name.contains("Lt.so")).collect();
    Err(failed(format!(
        "found none of {}; it comes with the CUDA toolkit, and LD_LIBRARY_PATH may name its folder",
        names.join(", ")
    )))
}

/// Measures the linears on a GPU, in f16 with sums in f32.
///
/// # Errors
/// [`TableError::Reference`]: no library, too little memory, or what the GPU or the library says.
pub fn measure(
    gpu: u32,
    shapes: &[Shape],
    repeat: usize,
    found: &mut References,
) -> Result<(), TableError> {
    check_library()?;
    let products = shapes.iter().filter_map(Product::of);
    let products: Vec<Product> = products.collect();
    let times = time(gpu, &products, repeat).map_err(|error| failed(error.to_string()))?;
    for (product, time) in products.iter().zip(times) {
        let reference = Reference {
            name: NAME.to_owned(),
            format: "f16".to_owned(),
            time,
        };
        found.entry(product.shape).or_default().push(reference);
    }
    Ok(())
}

fn failed(problem: String) -> TableError {
    TableError::Reference {
        name: NAME,
        problem,
    }
}

/// out (rows, n) = x (rows, k) times the transpose of w (n, k).
#[derive(Clone, Copy)]
struct Product {
    shape: Shape,
    rows: usize,
    n: usize,
    k: usize,
}

impl Product {
    fn of(shape: &Shape) -> Option<Product> {
        match *shape {
            Shape::Linear { rows, n, k } => Some(Product {
                shape: *shape,
                rows,
                n,
                k,
            }),
            Shape::Attention { .. } => None,
        }
    }

    fn weight_bytes(&self) -> usize {
        self.n * self.k * ELEMENT_BYTES
    }

    /// Weights that go round.
    fn copies(&self) -> usize {
        ROTATED_BYTES.div_ceil(self.weight_bytes())
    }

    /// Where the weights of a turn lie.
    fn weights_offset(&self, turn: usize) -> u64 {
        (turn % self.copies() * self.weight_bytes()) as u64
    }
}

/// Where the operands lie, the same for all products.
struct Operands {
    weights: DeviceAddress,
    x: DeviceAddress,
    out: DeviceAddress,
    workspace: DeviceAddress,
}

fn time(gpu: u32, products: &[Product], repeat: usize) -> Result<Vec<Times>, DriverError> {
    let mut driver = NvidiaDriver::open(gpu)?;
    let most = |bytes: fn(&Product) -> usize| products.iter().map(bytes).max().unwrap_or(0);
    let weights_bytes = most(|product| product.copies() * product.weight_bytes());
    let x_bytes = most(|product| product.rows * product.k * ELEMENT_BYTES);
    let operands = Operands {
        weights: operand(&mut driver, weights_bytes)?,
        x: operand(&mut driver, x_bytes)?,
        out: driver.allocate(most(|product| product.rows * product.n * ELEMENT_BYTES) as u64)?,
        workspace: driver.allocate(WORKSPACE_BYTES as u64)?,
    };
    // The driver has made its context current to this thread.
    let library = Owned::new(
        "cublasLtCreate",
        // SAFETY: the library was found; the handle is written.
        |handle| unsafe { sys::cublasLtCreate(handle) },
        sys::cublasLtDestroy,
    )?;
    let time = |product| time_product(&mut driver, &library, product, &operands, repeat);
    products.iter().map(time).collect()
}

/// Memory with numbers in it: a GPU that multiplies zeros takes less power, and is faster.
fn operand(driver: &mut NvidiaDriver, bytes: usize) -> Result<DeviceAddress, DriverError> {
    let mut rng = Rng::with_seed(1);
    // Sign and mantissa are arbitrary: from 1/16 to 1/8.
    let mut element = || (rng.u16(..) & 0x83ff) | 0x2c00;
    let pattern: Vec<u16> = (0..PATTERN_ELEMENTS).map(|_| element()).collect();
    let pattern: &[u8] = bytemuck::cast_slice(&pattern);
    let memory = driver.allocate(bytes as u64)?;
    for start in (0..bytes).step_by(pattern.len()) {
        let len = pattern.len().min(bytes - start);
        driver.upload(memory.offset(start as u64), &pattern[..len])?;
    }
    Ok(memory)
}

fn time_product(
    driver: &mut NvidiaDriver,
    library: &Owned<sys::cublasLtContext>,
    product: &Product,
    operands: &Operands,
    repeat: usize,
) -> Result<Times, DriverError> {
    let Product { rows, n, k, .. } = *product;
    let place = format!("({rows}, {k}) x ({n}, {k})");
    // The library counts columns first: its out is (n, rows), of w (k, n) transposed and x (k, rows).
    let product_of = Owned::<cublasLtMatmulDescOpaque_t>::new(
        "cublasLtMatmulDescCreate",
        // SAFETY: the library is loaded; the handle is written.
        |handle| unsafe {
            let sums = cublasComputeType_t::CUBLAS_COMPUTE_32F;
            sys::cublasLtMatmulDescCreate(handle, sums, cudaDataType::CUDA_R_32F)
        },
        sys::cublasLtMatmulDescDestroy,
    )?;
    // SAFETY: the attribute is of this type, and copied.
    let set = unsafe {
        sys::cublasLtMatmulDescSetAttribute(
            product_of.raw,
            cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
            (&raw const TRANSPOSED).cast(),
            size_of_val(&TRANSPOSED),
        )
    };
    check(set, "cublasLtMatmulDescSetAttribute")?;
    let [w, x, out] = [(k, n), (k, rows), (n, rows)].map(|(height, width)| layout(height, width));
    let (w, x, out) = (w?, x?, out?);
    let preference = Owned::new(
        "cublasLtMatmulPreferenceCreate",
        // SAFETY: the library is loaded; the handle is written.
        |handle| unsafe { sys::cublasLtMatmulPreferenceCreate(handle) },
        sys::cublasLtMatmulPreferenceDestroy,
    )?;
    // SAFETY: the attribute is of this type, and copied.
    let set = unsafe {
        sys::cublasLtMatmulPreferenceSetAttribute(
            preference.raw,
            cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const WORKSPACE_BYTES).cast(),
            size_of_val(&WORKSPACE_BYTES),
        )
    };
    check(set, "cublasLtMatmulPreferenceSetAttribute")?;
    let (mut best, mut count) = (MaybeUninit::zeroed(), 0);
    // SAFETY: all handles exist; there is room for the one result that is asked for.
    let chosen = unsafe {
        sys::cublasLtMatmulAlgoGetHeuristic(
            library.raw,
            product_of.raw,
            w.raw,
            x.raw,
            out.raw,
            out.raw,
            preference.raw,
            1,
            best.as_mut_ptr(),
            &raw mut count,
        )
    };
    let chosen = check(chosen, "cublasLtMatmulAlgoGetHeuristic");
    chosen.map_err(|error| error.at(|| place.clone()))?;
    if count < 1 {
        return Err(DriverError {
            call: "cublasLtMatmulAlgoGetHeuristic",
            place,
            problem: "the library has no kernel for it".to_owned(),
        });
    }
    // SAFETY: the library counts one result, so it wrote it; zeros are a result as well.
    let best = unsafe { best.assume_init() };
    let (one, zero) = (1_f32, 0_f32);
    let pointer = |address: DeviceAddress| address.0 as *mut c_void;
    let enqueue = |turn: usize, stream: *mut c_void| {
        let weights = operands.weights.offset(product.weights_offset(turn));
        // SAFETY: the operands have these shapes and stay until the driver is dropped; the workspace is as
        // large as said; the stream is the driver's.
        let enqueued = unsafe {
            sys::cublasLtMatmul(
                library.raw,
                product_of.raw,
                (&raw const one).cast(),
                pointer(weights),
                w.raw,
                pointer(operands.x),
                x.raw,
                (&raw const zero).cast(),
                pointer(operands.out),
                out.raw,
                pointer(operands.out),
                out.raw,
                &raw const best.algo,
                pointer(operands.workspace),
                WORKSPACE_BYTES,
                stream.cast(),
            )
        };
        check(enqueued, "cublasLtMatmul").map_err(|error| error.at(|| place.clone()))
    };
    let graph = driver.record_work(&place, WARM_UP + repeat, enqueue)?;
    driver.replay(graph)?;
    let times = driver.launch_times(graph)?.into_iter().skip(WARM_UP);
    Ok(Times::of(
        times.map(|time| time.as_secs_f64() * 1e6).collect(),
    ))
}

/// A matrix without gaps, columns one after another.
fn layout(height: usize, width: usize) -> Result<Owned<cublasLtMatrixLayoutOpaque_t>, DriverError> {
    Owned::new(
        "cublasLtMatrixLayoutCreate",
        // SAFETY: the library is loaded; the handle is written.
        |handle| unsafe {
            let [rows, columns] = [height, width].map(|size| size as u64);
            sys::cublasLtMatrixLayoutCreate(handle, ELEMENT, rows, columns, height as i64)
        },
        sys::cublasLtMatrixLayoutDestroy,
    )
}

/// What the library gives, and takes back when it is dropped.
struct Owned<T> {
    raw: *mut T,
    destroy: unsafe fn(*mut T) -> cublasStatus_t,
}

impl<T> Owned<T> {
    fn new(
        call: &'static str,
        create: impl FnOnce(*mut *mut T) -> cublasStatus_t,
        destroy: unsafe fn(*mut T) -> cublasStatus_t,
    ) -> Result<Owned<T>, DriverError> {
        let mut raw = ptr::null_mut();
        check(create(&raw mut raw), call)?;
        Ok(Owned { raw, destroy })
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once, by the function that belongs to it.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

fn check(status: cublasStatus_t, call: &'static str) -> Result<(), DriverError> {
    match status {
        cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        _ => Err(DriverError {
            call,
            place: String::new(),
            problem: format!("{status:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No machine of continuous integration has the library.
    #[test]
    fn a_library_that_is_not_there_is_named() {
        let Err(error) = check_library() else { return };
        let message = error.to_string();
        assert!(
            message.starts_with(
                "cannot measure cublaslt: found none of libcublasLt.so, libcublasLt.so.13, "
            ),
            "{message}"
        );
        let asked = [Shape::Linear {
            rows: 1,
            n: 8,
            k: 8,
        }];
        let refused = measure(0, &asked, 1, &mut References::new()).unwrap_err();
        assert_eq!(refused.to_string(), message);
    }

    #[test]
    fn weights_go_round_in_copies_larger_than_caches() {
        let product = |n, k| Product::of(&Shape::Linear { rows: 3, n, k }).unwrap();
        let small = product(768, 3072);
        assert_eq!(small.weight_bytes(), 768 * 3072 * 2);
        assert_eq!(small.copies(), 57);
        let offsets = [1, 56, 57].map(|turn| small.weights_offset(turn) as usize);
        assert_eq!(
            offsets,
            [small.weight_bytes(), 56 * small.weight_bytes(), 0]
        );
        let large = product(50272, 8192);
        assert_eq!((large.copies(), large.weights_offset(1)), (1, 0));
    }
}
