//! The same products by other programs, on the same threads or the same GPU: the `gemm` crate, and PyTorch.

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
pub const ROTATED_BYTES: usize = 256 << 20;
/// Products of a shape before those that count.
pub const WARM_UP: usize = 2;

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

/// Where PyTorch computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On so many threads.
    Cpu {
        /// How many.
        threads: usize,
    },
    /// On the GPU of this number.
    Gpu(u32),
}

/// Measures all shapes with PyTorch: in f32 and bf16 on a CPU, in f16 and bf16 on a GPU. `python` is an
/// interpreter that has it.
///
/// # Errors
/// [`TableError::Reference`] with what Python said.
pub fn torch(
    python: &Path,
    shapes: &[Shape],
    place: Place,
    repeat: usize,
    found: &mut References,
) -> Result<(), TableError> {
    let failed = |problem: String| TableError::Reference {
        name: "torch",
        problem,
    };
    let (device, threads) = match place {
        Place::Cpu { threads } => ("cpu".to_owned(), threads),
        // The host only enqueues.
        Place::Gpu(gpu) => (format!("cuda:{gpu}"), 1),
    };
    let request = serde_json::json!({
        "device": device,
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    const SHAPES: [Shape; 2] = [
        Shape::Linear {
            rows: 1,
            n: 64,
            k: 32,
        },
        Shape::Attention {
            sequences: 1,
            queries: 1,
            positions: 9,
            heads: 2,
            head_dim: 16,
        },
    ];

    /// What is asked of a Python that answers so, and what is made of its answer.
    fn asked(place: Place, script: &str) -> (serde_json::Value, Result<References, TableError>) {
        let dir = tempfile::tempdir().unwrap();
        let python = dir.path().join("python");
        let request = dir.path().join("request.json");
        let script = format!("#!/bin/sh\ncat > '{}'\n{script}\n", request.display());
        fs::write(&python, script).unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        let mut found = References::new();
        let result = torch(&python, &SHAPES, place, 2, &mut found);
        let request = fs::read_to_string(request).unwrap();
        (
            serde_json::from_str(&request).unwrap(),
            result.map(|()| found),
        )
    }

    #[test]
    fn a_gpu_is_asked_for_and_its_formats_are_kept() {
        let answer =
            r#"echo '[[{"format":"f16","us":[4.0,2.0]},{"format":"bf16","us":[5,5]}],[]]'"#;
        let (request, found) = asked(Place::Gpu(3), answer);
        assert_eq!(request["device"], "cuda:3");
        assert_eq!(request["shapes"][1]["positions"], 9);
        let found = found.unwrap();
        let linear = &found[&SHAPES[0]];
        let formats: Vec<&str> = linear.iter().map(|has| has.format.as_str()).collect();
        assert_eq!(formats, ["f16", "bf16"]);
        assert_eq!(
            (linear[0].time.median_us, linear[0].name.as_str()),
            (3.0, "torch")
        );
        assert!(found[&SHAPES[1]].is_empty());

        let (request, _) = asked(Place::Cpu { threads: 7 }, answer);
        assert_eq!(
            (&request["device"], &request["threads"]),
            (&"cpu".into(), &7.into())
        );
    }

    #[test]
    fn answers_that_are_not_sound_are_refused() {
        let not_sound = "needed are 2 times for each of 2 shapes";
        for (script, expect) in [
            ("echo noise", "its answer is not sound"),
            ("echo '[[]]'", not_sound),
            (r#"echo '[[{"format":"f16","us":[1.0]}],[]]'"#, not_sound),
            (
                r#"echo '[[{"format":"f16","us":[1.0,-1.0]}],[]]'"#,
                not_sound,
            ),
            (
                "echo 'Torch has no CUDA' >&2; exit 1",
                "python: Torch has no CUDA",
            ),
        ] {
            let message = asked(Place::Gpu(0), script).1.unwrap_err().to_string();
            assert!(
                message.starts_with("cannot measure torch: ") && message.contains(expect),
                "{message}"
            );
        }
    }
}
