//! The emulation of CUDA: it computes what a GPU does, and finds the mistakes planted in
//! `tests/emulation/kernels`.

use half::{bf16, f16};
use kiln_bundle::StepPointers;
use kiln_runtime::device::cuda::{
    BoundLaunch, DeviceAddress, Driver, DriverError, KernelHandle, KernelImage,
};
use kiln_tests::{
    emulation::{EmulatedDriver, EmulationOptions, compile_all, rerun_sanitized},
    repository,
};
use std::{mem::offset_of, process::Output, time::Instant};

/// One of the kernels of this test.
fn image(source: &str, entry: &str, block_threads: u32, dynamic_smem_bytes: u32) -> KernelImage {
    KernelImage {
        entry: entry.to_owned(),
        source: repository("tests/emulation/kernels").join(source),
        cubin: None,
        block_threads,
        dynamic_smem_bytes,
    }
}

fn driver(seed: u64) -> EmulatedDriver {
    EmulatedDriver::new(EmulationOptions {
        seed,
        ..EmulationOptions::default()
    })
}

/// Memory that holds these words.
fn memory(driver: &mut EmulatedDriver, words: &[u32]) -> DeviceAddress {
    let address = driver.allocate(words.len() as u64 * 4).unwrap();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    driver.upload(address, &bytes).unwrap();
    address
}

fn words(driver: &mut EmulatedDriver, from: DeviceAddress, count: usize) -> Vec<u32> {
    let ticket = driver.download(from, count * 4).unwrap();
    let bytes = driver.wait(ticket).unwrap();
    let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    bytes.chunks_exact(4).map(word).collect()
}

fn address(address: DeviceAddress) -> Vec<u8> {
    address.0.to_le_bytes().to_vec()
}

fn bound(kernel: KernelHandle, blocks: u32, parameters: &[Vec<u8>]) -> BoundLaunch {
    BoundLaunch {
        kernel,
        grid: [blocks, 1, 1],
        parameters: parameters.to_vec(),
        place: "a test".to_owned(),
    }
}

fn launch(
    driver: &mut EmulatedDriver,
    image: &KernelImage,
    blocks: u32,
    parameters: &[Vec<u8>],
) -> Result<(), DriverError> {
    let kernel = driver.load(image).unwrap();
    driver.launch(&bound(kernel, blocks, parameters))
}

/// Launches one block of a kernel of `mistakes.cu` and gives the error.
fn mistake(entry: &str, threads: u32, parameters: &[Vec<u8>]) -> String {
    let mut driver = driver(0);
    let out = memory(&mut driver, &[0; 64]);
    let parameters = [parameters, &[address(out)]].concat();
    let image = image("mistakes.cu", entry, threads, 0);
    let error = launch(&mut driver, &image, 1, &parameters).unwrap_err();
    assert_eq!(error.place, "a test");
    error.to_string()
}

fn assert_holds(text: &str, expected: &[&str]) {
    for part in expected {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

#[test]
fn every_f16_and_bf16_unpacks() {
    let mut driver = driver(0);
    let [f16s, bf16s] = [(); 2].map(|()| memory(&mut driver, &[0; 1 << 16]));
    let image = image("numbers.cu", "unpack_all", 256, 0);
    launch(&mut driver, &image, 256, &[address(f16s), address(bf16s)]).unwrap();
    let same = |bits: u32, expected: f32| {
        let found = f32::from_bits(bits);
        found.is_nan() && expected.is_nan() || bits == expected.to_bits()
    };
    for (bits, found) in (0..=u16::MAX).zip(words(&mut driver, f16s, 1 << 16)) {
        assert!(same(found, f16::from_bits(bits).to_f32()), "{bits:#06x}");
    }
    for (bits, found) in (0..=u16::MAX).zip(words(&mut driver, bf16s, 1 << 16)) {
        assert!(same(found, bf16::from_bits(bits).to_f32()), "{bits:#06x}");
    }
}

#[test]
fn products_and_sums_are_rounded_once() {
    // Codes of eight bits as subnormal numbers, raised and lowered: all of it is exact. Then one half of the
    // last place, which rounds to even, and a little more, which rounds up; f32 has no room for that much.
    let mut f16s: Vec<([u16; 3], u16)> = vec![];
    let mut bf16s = f16s.clone();
    let ([one, half, less], [one_b, half_b, less_b]) = (
        [1.0, 2f32.powi(-11), 2f32.powi(-24)].map(|x| f16::from_f32(x).to_bits()),
        [1.0, 2f32.powi(-8), 2f32.powi(-40)].map(|x| bf16::from_f32(x).to_bits()),
    );
    for code in 0..256u16 {
        let number = f32::from(code) - 128.0;
        let exact = f16::from_f32(number / 512.0).to_bits();
        f16s.push(([code, 0x7800, 0xb400], exact));
        let exact = bf16::from_f32(number / 64.0).to_bits();
        bf16s.push(([code, 0x7f00, 0xc000], exact));
    }
    f16s.extend([([one, half, one], one), ([half | 1, one, one], one + 1)]);
    bf16s.extend([
        ([one_b, half_b, one_b], one_b),
        ([half_b | 1, one_b, one_b], one_b + 1),
    ]);
    let (negative, negative_b) = (0x8000 | less, 0x8000 | less_b);
    f16s.extend([([half + 1, one, one], one + 1), ([negative, one, one], one)]);
    bf16s.extend([
        ([half_b + 1, one_b, one_b], one_b + 1),
        ([negative_b, one_b, one_b], one_b),
    ]);
    for (of_f16, cases) in [(true, f16s), (false, bf16s)] {
        let mut driver = driver(0);
        let mut words_of = |operand: usize| {
            let mut list: Vec<u32> = cases
                .iter()
                .map(|(x, _)| u32::from(x[operand]) << 16)
                .collect();
            list.resize(512, 0);
            memory(&mut driver, &list)
        };
        let [a, b, c] = [0, 1, 2].map(&mut words_of);
        let found = [(); 2].map(|()| memory(&mut driver, &[0; 512]));
        let image = image("numbers.cu", "fuse_pairs", 256, 0);
        let parameters = [a, b, c, found[0], found[1]].map(address);
        launch(&mut driver, &image, 2, &parameters).unwrap();
        let found = words(&mut driver, found[usize::from(!of_f16)], 512);
        for ((operands, expected), found) in cases.iter().zip(found) {
            assert_eq!(found >> 16, u32::from(*expected), "{operands:x?}");
        }
    }
}

#[test]
fn numbers_pack_to_the_nearest_even() {
    // Every f16 and bf16, the points half way to the next, and their neighbours.
    let mut numbers: Vec<f32> = vec![];
    for bits in 0..=u16::MAX {
        for half in [
            f16::from_bits(bits).to_f32(),
            bf16::from_bits(bits).to_f32(),
        ] {
            numbers.push(half);
        }
        let next = f16::from_bits(bits.wrapping_add(1)).to_f32();
        let middle = (f16::from_bits(bits).to_f32() + next) / 2.0;
        numbers.extend([middle, middle.next_up(), middle.next_down()]);
        let tie = f32::from_bits(u32::from(bits) << 16 | 0x8000);
        numbers.extend([tie, tie.next_up(), tie.next_down()]);
    }
    numbers.extend([65504.0, 65519.9, 65520.0, 65536.0, f32::MAX, f32::MIN]);
    numbers.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-45, -1e-8]);
    numbers.resize(numbers.len().next_multiple_of(512), 0.0);

    let mut driver = driver(0);
    let bits: Vec<u32> = numbers.iter().map(|number| number.to_bits()).collect();
    let pairs = numbers.len() / 2;
    let input = memory(&mut driver, &bits);
    let [f16s, bf16s] = [(); 2].map(|()| memory(&mut driver, &vec![0; pairs]));
    let image = image("numbers.cu", "pack_pairs", 256, 0);
    let parameters = [input, f16s, bf16s].map(address);
    launch(&mut driver, &image, (pairs / 256) as u32, &parameters).unwrap();

    let f16s = words(&mut driver, f16s, pairs);
    let bf16s = words(&mut driver, bf16s, pairs);
    for (i, pair) in numbers.chunks_exact(2).enumerate() {
        for (part, &number) in pair.iter().enumerate() {
            let of = |words: &[u32]| (words[i] >> (16 * part)) as u16;
            if number.is_nan() {
                assert_eq!((of(&f16s), of(&bf16s)), (0x7fff, 0x7fff));
            } else {
                assert_eq!(of(&f16s), f16::from_f32(number).to_bits(), "{number:e}");
                assert_eq!(of(&bf16s), bf16::from_f32(number).to_bits(), "{number:e}");
            }
        }
    }
}

/// Numbers of a few bits, whose products and sums are exact.
fn number(row: usize, column: usize) -> f32 {
    ((row * 31 + column * 17) % 23) as f32 / 8.0 - 1.0
}

#[test]
fn products_lie_as_the_instruction_has_them() {
    type Bits = fn(f32) -> u16;
    let types: [(&str, Bits); 2] = [
        ("product_f16", |x| f16::from_f32(x).to_bits()),
        ("product_bf16", |x| bf16::from_f32(x).to_bits()),
    ];
    for (entry, bits) in types {
        let mut driver = driver(3);
        let pair = |low: f32, high: f32| u32::from(bits(low)) | u32::from(bits(high)) << 16;
        // a (16 x 16), b (16 x 8), sum (16 x 8), in the fragments of PTX's m16n8k16.
        let (a, b) = (number, |k: usize, n: usize| number(n + 5, k + 2));
        let (mut of_a, mut of_b, mut of_sum) = (vec![], vec![], vec![]);
        for lane in 0..32 {
            let (group, two) = (lane / 4, lane % 4 * 2);
            for (row, k) in [(0, 0), (8, 0), (0, 8), (8, 8)] {
                let (row, k) = (group + row, two + k);
                of_a.push(pair(a(row, k), a(row, k + 1)));
            }
            for k in [two, two + 8] {
                of_b.push(pair(b(k, group), b(k + 1, group)));
            }
            for (row, n) in [(group, two), (group, two + 1)] {
                of_sum.push((row, n));
            }
            for (row, n) in [(group + 8, two), (group + 8, two + 1)] {
                of_sum.push((row, n));
            }
        }
        let before: Vec<u32> = of_sum
            .iter()
            .map(|&(row, n)| number(n, row).to_bits())
            .collect();
        let a_at = memory(&mut driver, &of_a);
        let b_at = memory(&mut driver, &of_b);
        let sum_at = memory(&mut driver, &before);
        let parameters = [a_at, b_at, sum_at].map(address);
        let image = image("products.cu", entry, 32, 0);
        launch(&mut driver, &image, 1, &parameters).unwrap();
        let found = words(&mut driver, sum_at, 128);
        for (&(row, n), bits) in of_sum.iter().zip(found) {
            let expected = (0..16).fold(number(n, row), |sum, k| sum + a(row, k) * b(k, n));
            assert_eq!(f32::from_bits(bits), expected, "{entry} ({row}, {n})");
        }
    }
}

#[test]
fn a_product_needs_the_whole_warp() {
    let mut driver = driver(0);
    let at = memory(&mut driver, &[0; 128]);
    let image = image("products.cu", "product_of_31", 32, 0);
    let error = launch(&mut driver, &image, 1, &[at, at, at].map(address)).unwrap_err();
    assert_holds(
        &error.to_string(),
        &["mma without all lanes", "0x7fffffff", "block (0, 0, 0)"],
    );
}

#[test]
fn lanes_exchange_values_and_votes() {
    for seed in 0..4 {
        let mut driver = driver(seed);
        let out = memory(&mut driver, &[0; 17 * 64]);
        let image = image("lanes.cu", "lanes", 64, 0);
        launch(&mut driver, &image, 1, &[address(out)]).unwrap();
        let found = words(&mut driver, out, 17 * 64);
        for thread in 0..64u32 {
            let (lane, warp) = (thread % 32, thread / 32 * 32);
            let of = |lane: u32| 100 + warp + lane;
            let up = |first: u32| if lane < first + 3 { lane } else { lane - 3 };
            let down = |end: u32| if lane + 3 < end { lane + 3 } else { lane };
            let eight = lane / 8 * 8;
            let thirds = (0..32).filter(|lane| (warp + lane) % 3 == 0);
            let mut expected = vec![
                of(5),
                of((lane + 1) % 32),
                of(eight + 3),
                of(up(0)),
                of(up(eight)),
                of(down(32)),
                of(down(eight + 8)),
                of(lane ^ 16),
                of(lane ^ 5),
                of(lane ^ 1),
                of(lane ^ 1),
                thirds.fold(0, |ballot, lane| ballot | 1 << lane),
                u32::from(warp == 32),
                u32::from(warp == 0),
                if lane < 16 { of(lane ^ 1) } else { 0xaaaa_0000 },
            ];
            if lane < 16 {
                expected.push(of(lane ^ 8));
            } else if lane < 24 {
                // Its partner has ended: whatever comes is no number.
                expected.push(u32::MAX);
            }
            if lane < 24 {
                expected.push(0x00ff_ffff);
            }
            for (row, &expected) in expected.iter().enumerate() {
                let found = found[row * 64 + thread as usize];
                assert_eq!(found, expected, "seed {seed}, thread {thread}, row {row}");
            }
        }
    }
}

fn sum(entry: &str, seed: u64) -> u32 {
    let mut driver = driver(seed);
    let numbers: Vec<u32> = (0..256).map(|i| i * i).collect();
    let [input, out] = [&numbers[..], &[0]].map(|words| memory(&mut driver, words));
    let image = image("sums.cu", entry, 256, 0);
    launch(&mut driver, &image, 1, &[input, out].map(address)).unwrap();
    words(&mut driver, out, 1)[0]
}

#[test]
fn a_sum_is_right_in_every_order_only_with_its_barriers() {
    let expected = (0..256u32).map(|i| i * i).sum::<u32>();
    for seed in 0..8 {
        assert_eq!(sum("sum_with_barriers", seed), expected, "seed {seed}");
    }
    let wrong = (0..8).filter(|&seed| sum("sum_without_barriers", seed) != expected);
    assert!(wrong.count() > 0, "the missing barrier does not show");
}

#[test]
fn the_last_block_sees_what_the_others_wrote() {
    let numbers: Vec<u32> = (0..256 * 20).collect();
    let mut driver = driver(0);
    let input = memory(&mut driver, &numbers);
    let [partial, counter, out] = [&[0; 20][..], &[0], &[0]].map(|at| memory(&mut driver, at));
    let parameters = [input, partial, counter, out].map(address);
    let kernel = driver
        .load(&image("sums.cu", "sum_of_blocks", 256, 0))
        .unwrap();
    let graph = driver.record(&[bound(kernel, 20, &parameters)]).unwrap();
    for seed in 0..8 {
        driver.set_seed(seed);
        driver.upload(out, &[0; 4]).unwrap();
        driver.replay(graph).unwrap();
        assert_eq!(words(&mut driver, out, 1), [numbers.iter().sum::<u32>()]);
        assert_eq!(words(&mut driver, counter, 1), [0]);
    }
}

#[test]
fn copies_arrive_when_they_are_waited_for() {
    let run = |entry: &str, seed| {
        let mut driver = driver(seed);
        let input: Vec<u32> = (0..256).collect();
        let [from, out] = [&input[..], &[0; 256]].map(|words| memory(&mut driver, words));
        let image = image("copies.cu", entry, 32, 1024);
        launch(&mut driver, &image, 1, &[from, out].map(address)).unwrap();
        words(&mut driver, out, 256)
    };
    let mut expected: Vec<u32> = (0..256).collect();
    expected[28..32].fill(0);
    for seed in 0..8 {
        assert_eq!(run("copy_and_wait", seed), expected);
    }
    let found = run("copy_without_wait", 0);
    assert_eq!(found[..128], expected[..128]);
    assert_eq!(found[128..], [u32::MAX; 128]);

    let right = |out: Vec<u32>| (0..32).all(|i| out[4 * i] == (i as u32 + 1) % 32);
    assert!(right(run("copy_too_early", 0)));
    assert!((1..8).any(|seed| !right(run("copy_too_early", seed))));
}

#[test]
fn every_block_finds_garbage_in_shared_memory() {
    let mut driver = driver(0);
    let out = memory(&mut driver, &[0; 128]);
    let image = image("copies.cu", "shared_before", 32, 128);
    launch(&mut driver, &image, 2, &[address(out)]).unwrap();
    assert_eq!(words(&mut driver, out, 128), [u32::MAX; 128]);
}

#[test]
fn a_step_is_passed_by_value() {
    let mut driver = driver(0);
    let lists = [&[7, 2, 0, 0, 0][..], &[11, 12], &[0, 0]];
    let [counts, token_ids, chosen] = lists.map(|words| memory(&mut driver, words));
    let mut step = vec![0; size_of::<StepPointers>()];
    for (at, list) in [
        (offset_of!(StepPointers, counts), counts),
        (offset_of!(StepPointers, token_ids), token_ids),
        (offset_of!(StepPointers, chosen), chosen),
    ] {
        step[at..at + 8].copy_from_slice(&address(list));
    }
    let image = image("steps.cu", "step_by_value", 32, 0);
    launch(&mut driver, &image, 1, &[step, vec![3, 0, 0, 0]]).unwrap();
    assert_eq!(words(&mut driver, chosen, 2), [11 + 7 + 3, 12 + 7 + 3]);
}

#[test]
fn threads_that_do_not_meet_are_named() {
    assert_holds(
        &mistake("divergent_barriers", 64, &[]),
        &[
            "`divergent_barriers`: block (0, 0, 0), thread 32: divergent __syncthreads",
            "threads 0-31 wait in __syncthreads (",
            "mistakes.cu:7)",
            "mistakes.cu:10)",
        ],
    );
    assert_holds(
        &mistake("barrier_against_shuffle", 64, &[]),
        &[
            "threads 0-39 wait in __syncthreads",
            "threads 40-63 wait in __shfl_xor_sync",
        ],
    );
    assert_holds(
        &mistake("different_shuffles", 32, &[]),
        &[
            "threads 0-15 wait in __shfl_xor_sync",
            "threads 16-31 wait in __ballot_sync",
        ],
    );
    assert_holds(
        &mistake("shuffle_outside_its_mask", 32, &[]),
        &["thread 16", "mask 0x0000ffff leaves out"],
    );
}

#[test]
fn other_mistakes_are_named() {
    let mut driver = driver(0);
    let zeros = memory(&mut driver, &[0; 256]);
    let never_waits = image("mistakes.cu", "never_waits", 32, 0);
    let error = launch(&mut driver, &never_waits, 2, &[address(zeros)]).unwrap_err();
    assert_holds(
        &error.to_string(),
        &["block (1, 0, 0): no thread has called wait_for_previous"],
    );
    assert_holds(
        &mistake("misaligned_weight", 32, &[address(zeros)]),
        &["thread 0: load_weight of an address that is no multiple of 16"],
    );
    assert_holds(
        &mistake("false_assumption", 32, &[]),
        &["thread 31", "threadIdx.x < 31"],
    );
    assert_holds(
        &mistake("copy_out_of_shared", 32, &[address(zeros)]),
        &["copy_async to an address outside of shared memory"],
    );
}

#[test]
fn launches_that_a_gpu_refuses_are_refused() {
    let mut driver = driver(0);
    let out = memory(&mut driver, &[0; 64]);
    let sums = image("sums.cu", "sum_with_barriers", 256, 0);
    let mut refused = |image: &KernelImage, blocks, parameters: &[Vec<u8>], expected: &str| {
        let error = launch(&mut driver, image, blocks, parameters).unwrap_err();
        assert_holds(&error.to_string(), &[expected]);
    };
    let two = [out, out].map(address);
    refused(&sums, 1, &two[..1], "1 parameters: the kernel has 2");
    refused(
        &sums,
        1,
        &[two[0].clone(), vec![0; 4]],
        "parameter 1 has 4 bytes: the kernel's has 8",
    );
    refused(&sums, 0, &two, "no grid");
    let threads = |block_threads| KernelImage {
        block_threads,
        ..sums.clone()
    };
    refused(&threads(1025), 1, &two, "a block of 1025 threads");
    let shared = |dynamic_smem_bytes| KernelImage {
        dynamic_smem_bytes,
        ..sums.clone()
    };
    refused(&shared(227 << 10), 1, &two, "static bytes of shared memory");

    let error = driver.load(&shared(228 << 10)).unwrap_err();
    assert_holds(&error.to_string(), &["a block has 232448"]);
    let error = driver.load(&image("sums.cu", "no_such_kernel", 32, 0));
    assert_holds(
        &error.unwrap_err().to_string(),
        &["sums.cu", "no_such_kernel"],
    );
    let error = driver.allocate(2 << 30).unwrap_err();
    assert_holds(&error.to_string(), &["out of memory"]);
    let error = driver.upload(out.offset(250), &[0; 8]).unwrap_err();
    assert_holds(&error.to_string(), &["8 bytes", "in no allocation"]);
}

#[test]
fn writes_beside_an_allocation_are_found() {
    for (place, expected) in [
        (64u64, "at offset 256 of an"),
        (-32i64 as u64, "at offset -128 of an"),
    ] {
        let mut driver = driver(0);
        let out = memory(&mut driver, &[0; 64]);
        let image = image("mistakes.cu", "write_at", 32, 0);
        let parameters = [address(out), place.to_le_bytes().to_vec()];
        let error = launch(&mut driver, &image, 1, &parameters).unwrap_err();
        assert_holds(&error.to_string(), &["`write_at` wrote", expected]);
    }
}

/// What a sanitizer says of the process's only launch, which must have been its end.
fn report(output: &Output, expected: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "nothing was found: {stderr}");
    assert_holds(&stderr, expected);
}

fn sanitized_launch(entry: &str, parameters: impl FnOnce(&mut EmulatedDriver) -> Vec<Vec<u8>>) {
    let mut driver = driver(0);
    let parameters = parameters(&mut driver);
    let image = image("mistakes.cu", entry, 32, 512);
    let result = launch(&mut driver, &image, 1, &parameters);
    eprintln!("not found: {result:?}");
    // The process is expected to fail: this is a success that fails the test outside.
    std::process::exit(0);
}

const PLACE: &str = "emulated: a test, block (0, 0, 0), thread 5";

/// Runs a kernel on `in` (or none), a place and `out` (or none), in a process with sanitizers.
macro_rules! sanitized {
    ($($(#[$meta:meta])* $test:ident: $entry:literal, $expected:expr, $parameters:expr;)*) => {$(
        $(#[$meta])*
        #[test]
        fn $test() {
            match rerun_sanitized(concat!("emulation::", stringify!($test))) {
                Some(output) => report(&output, &$expected),
                None => sanitized_launch($entry, $parameters),
            }
        }
    )*};
}

fn place(place: i64) -> Vec<u8> {
    place.to_le_bytes().to_vec()
}

sanitized! {
    reads_behind_an_allocation_are_found: "read_at",
        ["heap-buffer-overflow", "READ of size 4", "mistakes.cu", PLACE],
        |driver| vec![address(memory(driver, &[0; 64])), place(64 - 5), address(memory(driver, &[0; 64]))];
    reads_before_an_allocation_are_found: "read_at",
        ["heap-buffer-overflow", "READ of size 4", "thread 0"],
        |driver| vec![address(memory(driver, &[0; 64])), place(-1), address(memory(driver, &[0; 64]))];
    writes_behind_an_allocation_are_found: "write_at",
        ["heap-buffer-overflow", "WRITE of size 4", "mistakes.cu", PLACE],
        |driver| vec![address(memory(driver, &[0; 64])), place(64 - 5)];
    copies_from_behind_an_allocation_are_found: "copy_at",
        ["heap-buffer-overflow", "READ of size 1", "mistakes.cu", PLACE],
        |driver| vec![address(memory(driver, &[0; 64])), place(16 - 5), address(memory(driver, &[0; 128]))];
    reads_behind_dynamic_shared_memory_are_found: "read_shared_at",
        ["heap-buffer-overflow", "READ of size 4", PLACE],
        |driver| vec![place(128 - 5), address(memory(driver, &[0; 32]))];
    reads_behind_static_shared_memory_are_found: "read_static_at",
        ["index 32 out of bounds", "mistakes.cu", PLACE],
        |driver| vec![place(32 - 5), address(memory(driver, &[0; 32]))];
    reads_of_poisoned_memory_are_found: "read_at",
        ["use-after-poison", "READ of size 4", PLACE],
        |driver| {
            let arena = memory(driver, &[0; 256]);
            driver.poison(arena.offset(128), 64);
            driver.poison(arena.offset(256), 64);
            driver.unpoison(arena.offset(128), 64);
            vec![address(arena), place(64 - 5), address(memory(driver, &[0; 32]))]
        };
    reads_before_the_wait_are_found: "read_before_wait",
        ["use-after-poison", "READ of size 4", "mistakes.cu", "thread 16"],
        |driver| {
            let input = memory(driver, &[0; 32]);
            driver.hide(&[(input, 128)]);
            vec![address(input), address(memory(driver, &[0; 32]))]
        };
    shifts_too_far_are_found: "shift_by",
        ["runtime error: shift exponent 32 is too large", "mistakes.cu", "thread 0"],
        |driver| vec![32u32.to_le_bytes().to_vec(), address(memory(driver, &[0; 32]))];
}

/// What is right is right with sanitizers too, and a failed launch leaves stacks that can be used.
#[test]
fn sanitizers_find_nothing_in_what_is_right() {
    if let Some(output) = rerun_sanitized("emulation::sanitizers_find_nothing_in_what_is_right") {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        return;
    }
    for seed in 0..4 {
        assert_eq!(sum("sum_with_barriers", seed), 5_559_680);
    }
    let mut driver = driver(0);
    let out = memory(&mut driver, &[0; 17 * 64]);
    for _ in 0..3 {
        let wrong = image("mistakes.cu", "barrier_against_shuffle", 64, 0);
        launch(&mut driver, &wrong, 1, &[address(out)]).unwrap_err();
        let right = image("lanes.cu", "lanes", 64, 0);
        launch(&mut driver, &right, 1, &[address(out)]).unwrap();
    }
}

/// Prints what a switch of threads costs: `cargo test -p kiln-tests speed -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let rounds = 10_000u32;
    let value = rounds.to_le_bytes().to_vec();
    for seed in 0..2 {
        let mut driver = driver(seed);
        let out = address(memory(&mut driver, &[0; 256]));
        let cases = [
            ("only_barriers", rounds * 256, vec![value.clone()]),
            (
                "only_shuffles",
                rounds * 256,
                vec![value.clone(), out.clone()],
            ),
            (
                "only_products",
                rounds * 8,
                vec![value.clone(), out.clone()],
            ),
            ("nothing", 256, vec![]),
        ];
        let images = cases.clone().map(|case| image("speed.cu", case.0, 256, 0));
        compile_all(&images, false).unwrap();
        for ((entry, count, parameters), image) in cases.iter().zip(&images) {
            // The first launch makes the stacks.
            let kernel = driver.load(image).unwrap();
            let launch = bound(kernel, 1, parameters);
            driver.launch(&launch).unwrap();
            let start = Instant::now();
            driver.launch(&launch).unwrap();
            let nanoseconds = start.elapsed().as_secs_f64() * 1e9 / f64::from(*count);
            println!("seed {seed}, {entry}: {nanoseconds:.1} ns for each of {count}");
        }
    }
}
