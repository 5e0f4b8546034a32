//! NVRTC, NVIDIA's compiler as a library: found, loaded, and called.
//!
//! The library is opened by path and its functions are looked up by name, so that a machine without
//! it gets an error that says what to do, and nothing of CUDA is needed to build kiln.
//! Reference: <https://docs.nvidia.com/cuda/nvrtc/index.html>.

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::{
    env,
    ffi::{CStr, CString, OsString, c_char, c_int, c_void},
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::Command,
    ptr,
};

/// Options of every compilation, beside the target.
///
/// Fused multiply-adds are NVRTC's default and stated because results depend on them. The line
/// table costs a cubin some bytes and no time; with it a profiler shows sources.
pub(super) const OPTIONS: [&str; 5] = [
    "--std=c++17",
    "--fmad=true",
    "--ptxas-options=-v",
    "-default-device",
    "-lineinfo",
];

/// The first version that keeps a cache, and knows `--no-cache`.
const CACHING_VERSION: (u32, u32) = (12, 9);

/// A loaded NVRTC. Compilations may run on several threads at once.
///
/// Phases of a compilation hold a lock: from a second thread small kernels (80 ms each) gain little,
/// 1.0 to 1.6 times with NVRTC 13.0, and large ones (500 ms) all there is.
#[derive(Debug)]
pub struct Nvrtc {
    path: PathBuf,
    /// Of the library file. NVRTC does not tell its patch version; this does.
    file_bytes: u64,
    version: (u32, u32),
    architectures: Vec<u32>,
    functions: Functions,
}

/// A CUDA source and the headers that it may include.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Its file name, in messages and in the cubin's line table.
    pub name: &'a str,
    /// CUDA C++.
    pub text: &'a str,
    /// Headers: as `#include` spells them, and their text.
    pub headers: &'a [(&'a str, &'a str)],
}

/// What became of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// An ELF image of machine code for one target.
    pub cubin: Vec<u8>,
    /// What the compiler said: warnings, and the resources of each function.
    pub log: String,
}

/// Why there is no cubin.
#[derive(Debug, thiserror::Error)]
pub enum NvrtcError {
    /// The machine's: it has no NVRTC where one is looked for.
    #[error(
        "found no NVRTC (libnvrtc.so) in {}; scripts/fetch-nvrtc fetches it, or KILN_NVRTC names it",
        listed(.looked_in)
    )]
    Missing {
        /// The folders, in order.
        looked_in: Vec<PathBuf>,
    },
    /// The machine's: a library that cannot be loaded, or lacks a function.
    #[error(
        "cannot load {}: {source}; scripts/fetch-nvrtc fetches an NVRTC that works, \
         KILN_NVRTC chooses one",
        path.display()
    )]
    Load {
        /// The library.
        path: PathBuf,
        /// What the loader said.
        source: libloading::Error,
    },
    /// The machine's: this NVRTC is too old (before 12.8 for sm_100a and sm_120a), or the caller's:
    /// no such target.
    #[error(
        "NVRTC {}.{} ({}) has no target {arch}, only {supported}; scripts/fetch-nvrtc fetches \
         version 13.0, KILN_NVRTC chooses another",
        version.0, version.1, path.display()
    )]
    Target {
        /// The target asked for.
        arch: String,
        /// The library.
        path: PathBuf,
        /// Its version, major and minor.
        version: (u32, u32),
        /// The targets it has.
        supported: String,
    },
    /// The source's, which is the emitter's mistake.
    #[error("{name} does not compile for {arch}:\n{log}")]
    Compile {
        /// The source.
        name: String,
        /// The target.
        arch: String,
        /// What the compiler said.
        log: String,
    },
    /// The source's: it holds a NUL character, and NVRTC takes C strings.
    #[error("{name} holds a NUL character")]
    Nul {
        /// The source or header.
        name: String,
    },
    /// NVRTC's own.
    #[error("{name}, {arch}: NVRTC's {function} failed: {message}")]
    Call {
        /// The source.
        name: String,
        /// The target.
        arch: String,
        /// The function that was called.
        function: &'static str,
        /// What NVRTC calls the error.
        message: String,
    },
}

impl Nvrtc {
    /// Looks for NVRTC and loads it.
    ///
    /// `KILN_NVRTC` (a library or a folder) decides alone where it is set. Otherwise the first of:
    /// the toolkit of `CUDA_HOME` or `CUDA_PATH`; the folder `target/nvrtc`, filled by
    /// `scripts/fetch-nvrtc`, of the current directory or around this program; the packages of
    /// `VIRTUAL_ENV`; those of `python3`.
    ///
    /// # Errors
    /// [`NvrtcError::Missing`], or [`NvrtcError::Load`] for the first that was found.
    pub fn find() -> Result<Nvrtc, NvrtcError> {
        if let Some(path) = variable("KILN_NVRTC") {
            return Nvrtc::open(Path::new(&path));
        }
        let mut looked_in = vec![];
        let places: [fn() -> Vec<PathBuf>; 4] = [
            toolkit_folders,
            fetched_folders,
            environment_folders,
            python_folders,
        ];
        for place in places {
            for folder in place() {
                if let Some(library) = library_in(&folder) {
                    return Nvrtc::load(&library);
                }
                looked_in.push(folder);
            }
        }
        Err(NvrtcError::Missing { looked_in })
    }

    /// Loads NVRTC from a library file, or from a folder that holds one itself or in `lib64` or
    /// `lib`.
    ///
    /// # Errors
    /// [`NvrtcError::Missing`], [`NvrtcError::Load`].
    pub fn open(path: &Path) -> Result<Nvrtc, NvrtcError> {
        if path.is_file() {
            return Nvrtc::load(path);
        }
        let looked_in = vec![path.to_owned(), path.join("lib64"), path.join("lib")];
        match looked_in.iter().find_map(|folder| library_in(folder)) {
            Some(library) => Nvrtc::load(&library),
            None => Err(NvrtcError::Missing { looked_in }),
        }
    }

    fn load(path: &Path) -> Result<Nvrtc, NvrtcError> {
        // The loader reads a name without a slash as one to search for.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let functions = Functions::load(&path)?;
        let version = functions.version();
        // NVRTC opens its builtins by name alone when it first compiles, and so finds them loaded,
        // wherever they lie. A library that has them on the search path needs no help.
        let builtins =
            path.with_file_name(format!("libnvrtc-builtins.so.{}.{}", version.0, version.1));
        if builtins.is_file() {
            load_library(&builtins)?;
        }
        Ok(Nvrtc {
            file_bytes: fs::metadata(&path).map_or(0, |file| file.len()),
            version,
            architectures: functions.architectures(),
            functions,
            path,
        })
    }

    /// Version, major and minor.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The library's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What tells this compiler from one that may give other bytes.
    pub(super) fn identity(&self) -> String {
        format!("{}.{}/{}", self.version.0, self.version.1, self.file_bytes)
    }

    /// That `arch` (`sm_90a`) is a target of this NVRTC.
    ///
    /// # Errors
    /// [`NvrtcError::Target`].
    pub fn check_target(&self, arch: &str) -> Result<(), NvrtcError> {
        let number = arch.strip_prefix("sm_").map(|rest| {
            let digits = rest.trim_end_matches(|c: char| c.is_ascii_lowercase());
            digits.parse().unwrap_or(0)
        });
        if number.is_some_and(|number| self.architectures.contains(&number)) {
            return Ok(());
        }
        let supported: Vec<String> = self
            .architectures
            .iter()
            .map(|number| format!("sm_{number}"))
            .collect();
        Err(NvrtcError::Target {
            arch: arch.to_owned(),
            path: self.path.clone(),
            version: self.version,
            supported: supported.join(", "),
        })
    }

    /// Compiles `source` for `arch` (`sm_90a`). The same text gives the same bytes, wherever this
    /// program runs.
    ///
    /// # Errors
    /// [`NvrtcError::Target`], [`NvrtcError::Compile`], [`NvrtcError::Nul`], [`NvrtcError::Call`].
    pub fn compile(&self, source: &Source<'_>, arch: &str) -> Result<Compiled, NvrtcError> {
        self.check_target(arch)?;
        let program = Program::new(&self.functions, source, arch)?;
        let failed = program.compile().err();
        let log = program.log()?;
        if let Some(message) = failed {
            // Without a log there is still the name of the error.
            let log = if log.is_empty() { message } else { log };
            return Err(NvrtcError::Compile {
                name: source.name.to_owned(),
                arch: arch.to_owned(),
                log,
            });
        }
        let cubin = program.cubin()?;
        Ok(Compiled { cubin, log })
    }
}

/// A program being compiled; destroyed when dropped.
struct Program<'a> {
    functions: &'a Functions,
    handle: Handle,
    name: &'a str,
    arch: &'a str,
}

impl<'a> Program<'a> {
    fn new(
        functions: &'a Functions,
        source: &Source<'a>,
        arch: &'a str,
    ) -> Result<Program<'a>, NvrtcError> {
        let name = c_string(source.name, source.name)?;
        let text = c_string(source.name, &numbered(source.name, source.text))?;
        let header_names = source
            .headers
            .iter()
            .map(|(name, _)| c_string(name, name))
            .collect::<Result<Vec<_>, _>>()?;
        let header_texts = source
            .headers
            .iter()
            .map(|(name, text)| c_string(name, &numbered(name, text)))
            .collect::<Result<Vec<_>, _>>()?;
        let (names, texts) = (pointers(&header_names), pointers(&header_texts));
        let mut program = Program {
            functions,
            handle: ptr::null_mut(),
            name: source.name,
            arch,
        };
        // SAFETY: the strings end with NUL and, as the two arrays of `names.len()` pointers, live
        // until the call returns; NVRTC copies them. `handle` is written on success.
        let status = unsafe {
            (functions.create_program)(
                &mut program.handle,
                text.as_ptr(),
                name.as_ptr(),
                names.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        program.done("nvrtcCreateProgram", status)?;
        Ok(program)
    }

    /// The error is NVRTC's name of it; the log has more.
    fn compile(&self) -> Result<(), String> {
        let arch = format!("--gpu-architecture={}", self.arch);
        // What NVRTC finds in the cache that it shares with the driver comes without a log.
        let no_cache = self.functions.version() >= CACHING_VERSION;
        let options = [arch.as_str()]
            .iter()
            .chain(&OPTIONS)
            .chain(no_cache.then_some(&"--no-cache"))
            .map(|option| CString::new(*option))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| error.to_string())?;
        let options = (pointers(&options), options);
        // SAFETY: `handle` is a program that nothing else uses; the array and its strings, which
        // end with NUL, live until the call returns.
        let status = unsafe {
            (self.functions.compile_program)(
                self.handle,
                options.0.len() as c_int,
                options.0.as_ptr(),
            )
        };
        match status {
            SUCCESS => Ok(()),
            status => Err(self.functions.message(status)),
        }
    }

    /// What was said, without what differs from run to run.
    fn log(&self) -> Result<String, NvrtcError> {
        let bytes = self.bytes(
            ("nvrtcGetProgramLogSize", self.functions.log_size),
            ("nvrtcGetProgramLog", self.functions.log),
        )?;
        let text = String::from_utf8_lossy(&bytes);
        let mut log = String::new();
        for line in text.trim_end_matches('\0').trim_end().lines() {
            if !line.contains("Compile time =") {
                let _ = writeln!(log, "{line}");
            }
        }
        Ok(log)
    }

    fn cubin(&self) -> Result<Vec<u8>, NvrtcError> {
        self.bytes(
            ("nvrtcGetCUBINSize", self.functions.cubin_size),
            ("nvrtcGetCUBIN", self.functions.cubin),
        )
    }

    fn bytes(
        &self,
        size: (&'static str, GetSize),
        get: (&'static str, GetBytes),
    ) -> Result<Vec<u8>, NvrtcError> {
        let mut len = 0;
        // SAFETY: `handle` is a live program; `len` takes the size.
        let status = unsafe { (size.1)(self.handle, &mut len) };
        self.done(size.0, status)?;
        let mut bytes = vec![0_u8; len];
        // SAFETY: NVRTC writes the `len` bytes that it announced, and `bytes` has as many.
        let status = unsafe { (get.1)(self.handle, bytes.as_mut_ptr().cast()) };
        self.done(get.0, status)?;
        Ok(bytes)
    }

    fn done(&self, function: &'static str, status: c_int) -> Result<(), NvrtcError> {
        if status == SUCCESS {
            return Ok(());
        }
        Err(NvrtcError::Call {
            name: self.name.to_owned(),
            arch: self.arch.to_owned(),
            function,
            message: self.functions.message(status),
        })
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: made by nvrtcCreateProgram, destroyed once.
            unsafe { (self.functions.destroy_program)(&mut self.handle) };
        }
    }
}

/// The text under its own name. Without one the line table names a header by the directory in
/// which this program happens to run.
fn numbered(name: &str, text: &str) -> String {
    format!("#line 1 \"/{name}\"\n{text}")
}

fn c_string(name: &str, text: &str) -> Result<CString, NvrtcError> {
    CString::new(text).map_err(|_| NvrtcError::Nul {
        name: name.to_owned(),
    })
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

type Handle = *mut c_void;
type GetSize = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type GetBytes = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;
const SUCCESS: c_int = 0;

/// The functions of `nvrtc.h` that are called.
#[derive(Clone, Copy, Debug)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    architectures_len: unsafe extern "C" fn(*mut c_int) -> c_int,
    architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    create_program: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile_program: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    destroy_program: unsafe extern "C" fn(*mut Handle) -> c_int,
    log_size: GetSize,
    log: GetBytes,
    cubin_size: GetSize,
    cubin: GetBytes,
}

impl Functions {
    fn load(path: &Path) -> Result<Functions, NvrtcError> {
        let library = load_library(path)?;
        // SAFETY: the names and signatures are those of nvrtc.h, unchanged since version 11.2, and
        // the library is never unloaded.
        let functions = unsafe {
            (|| {
                Ok::<_, libloading::Error>(Functions {
                    version: *library.get(b"nvrtcVersion\0")?,
                    architectures_len: *library.get(b"nvrtcGetNumSupportedArchs\0")?,
                    architectures: *library.get(b"nvrtcGetSupportedArchs\0")?,
                    error_string: *library.get(b"nvrtcGetErrorString\0")?,
                    create_program: *library.get(b"nvrtcCreateProgram\0")?,
                    compile_program: *library.get(b"nvrtcCompileProgram\0")?,
                    destroy_program: *library.get(b"nvrtcDestroyProgram\0")?,
                    log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                    log: *library.get(b"nvrtcGetProgramLog\0")?,
                    cubin_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                    cubin: *library.get(b"nvrtcGetCUBIN\0")?,
                })
            })()
        };
        functions.map_err(|source| NvrtcError::Load {
            path: path.to_owned(),
            source,
        })
    }

    /// (0, 0) where NVRTC does not say.
    fn version(&self) -> (u32, u32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both take a number.
        unsafe { (self.version)(&mut major, &mut minor) };
        (major.unsigned_abs(), minor.unsigned_abs())
    }

    /// Compute capabilities as numbers (90), ascending; none where NVRTC does not say.
    fn architectures(&self) -> Vec<u32> {
        let mut len = 0;
        // SAFETY: `len` takes a number.
        let status = unsafe { (self.architectures_len)(&mut len) };
        let mut numbers: Vec<c_int> = vec![0; usize::try_from(len).unwrap_or(0)];
        if status != SUCCESS || numbers.is_empty() {
            return vec![];
        }
        // SAFETY: NVRTC writes as many numbers as it announced, and `numbers` has as many.
        unsafe { (self.architectures)(numbers.as_mut_ptr()) };
        numbers.into_iter().map(c_int::unsigned_abs).collect()
    }

    fn message(&self, status: c_int) -> String {
        // SAFETY: returns a constant string for any number.
        let message = unsafe { (self.error_string)(status) };
        if message.is_null() {
            return format!("error {status}");
        }
        // SAFETY: a string that ends with NUL and is never freed.
        unsafe { CStr::from_ptr(message) }
            .to_string_lossy()
            .into_owned()
    }
}

/// Opens a library for the rest of this process: NVRTC keeps state in its threads.
fn load_library(path: &Path) -> Result<&'static Library, NvrtcError> {
    // SAFETY: NVIDIA's libraries may be loaded at any time, from any thread.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    match library {
        Ok(library) => Ok(Box::leak(Box::new(library))),
        Err(source) => Err(NvrtcError::Load {
            path: path.to_owned(),
            source,
        }),
    }
}

/// `libnvrtc.so`, `libnvrtc.so.13` and the like in a folder; of several the newest.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let libraries = fs::read_dir(folder).ok()?.filter_map(|entry| {
        let path = entry.ok()?.path();
        let suffix = path.file_name()?.to_str()?.strip_prefix("libnvrtc.so")?;
        let numbers = suffix.split('.').skip(1).map(str::parse::<u32>);
        let version = numbers.collect::<Result<Vec<_>, _>>().ok()?;
        (suffix.is_empty() || suffix.starts_with('.')).then_some((version, path))
    });
    libraries.max().map(|(_, path)| path)
}

/// An environment variable; an empty one is none.
fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

fn toolkit_folders() -> Vec<PathBuf> {
    ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(|name| variable(name))
        .flat_map(|toolkit| ["lib64", "lib"].map(|lib| Path::new(&toolkit).join(lib)))
        .collect()
}

/// Where `scripts/fetch-nvrtc` puts it. This program lies in `target/release`, a test in
/// `target/debug/deps`.
fn fetched_folders() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from("target/nvrtc/lib")];
    if let Ok(program) = env::current_exe() {
        let around = program.ancestors().skip(2).take(2);
        folders.extend(around.map(|folder| folder.join("nvrtc/lib")));
    }
    folders
}

/// The NVRTC packages of the environment that is active.
fn environment_folders() -> Vec<PathBuf> {
    let Some(environment) = variable("VIRTUAL_ENV") else {
        return vec![];
    };
    let versions = fs::read_dir(Path::new(&environment).join("lib"));
    let versions = versions.into_iter().flatten().flatten();
    let mut packages: Vec<_> = versions
        .map(|version| version.path().join("site-packages"))
        .collect();
    packages.sort();
    in_packages(&packages)
}

/// The NVRTC packages of `python3`. Starting an interpreter takes time: this is the last resort.
fn python_folders() -> Vec<PathBuf> {
    const SCRIPT: &str =
        "import site; print(*site.getsitepackages(), site.getusersitepackages(), sep='\\n')";
    let Ok(output) = Command::new("python3").args(["-c", SCRIPT]).output() else {
        return vec![];
    };
    let lines = String::from_utf8_lossy(&output.stdout);
    let packages: Vec<_> = lines.lines().map(PathBuf::from).collect();
    in_packages(&packages)
}

/// Where NVIDIA's packages of CUDA 13 and of CUDA 12 put the library.
fn in_packages(packages: &[PathBuf]) -> Vec<PathBuf> {
    let folders = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"];
    packages
        .iter()
        .flat_map(|packages| folders.map(|folder| packages.join(folder)))
        .collect()
}

fn listed(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(", ")
}
