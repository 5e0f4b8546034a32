//! The same products by other programs, on the same threads: the `gemm` crate, and PyTorch.

use super::error::TableError;
use super::kinds::Shape;
use crate::table::{Reference, Times};
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Deserialize;
use std::collections::HashMap;
use std::hint::black_box;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Weights go round in copies of at least so many bytes in all, far more than caches hold. A larger matrix
/// needs no second copy.
const ROTATED_BYTES: usize = 256 << 20;
const WARM_UP: usize = 2;

/// What each shape takes with others, by shape.
pub type References = HashMap<Shape, Vec<Reference>>;

/// Measures the linears with the `gemm` crate, in f32.
///
/// # Errors
/// [`TableError::Reference`] where there are no threads.
pub fn gemm(
    shapes: &[Shape],
    threads: usize,
    repeat: usize,
    found: &mut References,
) -> Result<(), TableError> {
    let pool = ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| TableError::Reference {
        name: "gemm",
        problem: error.to_string(),
    })?;
    for &shape in shapes {
        if let Shape::Linear { rows, n, k } = shape {
            let reference = Reference {
                name: "gemm".to_owned(),
                format: "f32".to_owned(),
                time: pool.install(|| product(&pool, rows, n, k, repeat)),
            };
            found.entry(shape).or_default().push(reference);
        }
    }
    Ok(())
}

fn product(pool: &ThreadPool, rows: usize, n: usize, k: usize, repeat: usize) -> Times {
    let copies = ROTATED_BYTES.div_ceil(n * k * size_of::<f32>());
    let weights = vec![0.01_f32; copies * n * k];
    let x = vec![0.5_f32; rows * k];
    let mut out = vec![0.0_f32; rows * n];
    let parallelism = match pool.current_num_threads() {
        1 => gemm::Parallelism::None,
        threads => gemm::Parallelism::Rayon(threads),
    };
    let mut times = Vec::new();
    for turn in 0..WARM_UP + repeat {
        let weight = &weights[turn % copies * n * k..][..n * k];
        let start = Instant::now();
        // SAFETY: all three are row-major and of these shapes: x (rows, k), the weight (n, k), read as
        // its transpose, and out (rows, n), which nothing else refers to.
        unsafe {
            gemm::gemm(
                rows,
                n,
                k,
                out.as_mut_ptr(),
                1,
                n as isize,
                false,
                x.as_ptr(),
                1,
                k as isize,
                weight.as_ptr(),
                k as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
        times.push(start.elapsed().as_secs_f64() * 1e6);
        black_box(&out);
    }
    Times::of(times.split_off(WARM_UP))
}

/// What `kernels_torch.py` answers for a shape.
#[derive(Deserialize)]
struct Answer {
    format: String,
    us: Vec<f64>,
}

/// Measures all shapes with PyTorch, in f32 and bf16. `python` is an interpreter that has it.
///
/// # Errors
/// [`TableError::Reference`] with what Python said.
pub fn torch(
    python: &Path,
    shapes: &[Shape],
    threads: usize,
    repeat: usize,
    found: &mut References,
) -> Result<(), TableError> {
    let failed = |problem: String| TableError::Reference {
        name: "torch",
        problem,
    };
    let request = serde_json::json!({
        "threads": threads,
        "repeat": repeat,
        "warm_up": WARM_UP,
        "rotated_bytes": ROTATED_BYTES,
        "shapes": shapes,
    });
    let child = Command::new(python)
        .arg("-c")
        .arg(include_str!("../../peers/kernels_torch.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|error| failed(format!("{}: {error}", python.display())))?;
    if let Some(mut input) = child.stdin.take() {
        // A Python that ends early says why.
        let _ = input.write_all(request.to_string().as_bytes());
    }
    let output = child.wait_with_output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().next_back().unwrap_or("it failed");
        return Err(failed(format!("{}: {last}", python.display())));
    }
    let answers: Vec<Vec<Answer>> = serde_json::from_slice(&output.stdout)
        .map_err(|error| failed(format!("its answer is not sound: {error}")))?;
    let times = |us: &[f64]| us.len() == repeat && us.iter().all(|us| us.is_finite() && *us > 0.0);
    if answers.len() != shapes.len() || answers.iter().flatten().any(|answer| !times(&answer.us)) {
        return Err(failed(format!(
            "its answer is not sound: needed are {repeat} times for each of {} shapes",
            shapes.len()
        )));
    }
    for (shape, answers) in shapes.iter().zip(answers) {
        let references = answers.into_iter().map(|Answer { format, us }| Reference {
            name: "torch".to_owned(),
            format,
            time: Times::of(us),
        });
        found.entry(*shape).or_default().extend(references);
    }
    Ok(())
}
