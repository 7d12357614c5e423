//! Lists the files that the program carries (`assets/`, `configs/`), and compiles the CUDA kernels of `src/ops/cuda/*.cu` when the feature
//! `cuda` is on.
//!
//! Each kernel file becomes a fat binary in `OUT_DIR` that the program embeds: machine code for the compute capability of
//! `CUDA_COMPUTE_CAP` (8.0 if it is not set) and for 9.0, and PTX that the driver translates for every newer card.
//! `NVCC` names the compiler, else it is looked for in `CUDA_HOME/bin`, `CUDA_PATH/bin` and `PATH`. Without one an
//! empty module is embedded, so that `cargo check` works anywhere; loading it is an error that says so.
//!
//! What each kernel takes is read from its source and written to a table that the program checks its launches against.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "src/ops/cuda/signatures.rs"]
#[allow(dead_code, reason = "the program checks with it")]
mod signatures;

const SOURCES: &str = "src/ops/cuda";

/// What the program carries.
const BUNDLED: [&str; 2] = ["assets", "configs"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={SOURCES}");
    for name in ["NVCC", "CUDA_COMPUTE_CAP", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    std::fs::write(out.join("bundle.rs"), bundle()).expect("writing to OUT_DIR");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        kernels(&out);
    }
}

/// The carried files with their names and a number of all their bytes, as an expression in Rust.
fn bundle() -> String {
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let mut names = Vec::new();
    for folder in BUNDLED {
        println!("cargo:rerun-if-changed={folder}");
        list(Path::new(folder), &mut names);
    }
    names.sort();
    let (mut files, mut mark) = (String::new(), 0xcbf2_9ce4_8422_2325_u64);
    for name in &names {
        let content = std::fs::read(name).expect("a file of the bundle");
        for &byte in name.to_str().expect("plain file names").as_bytes().iter().chain(&content) {
            mark = (mark ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3); // FNV-1a
        }
        files += &format!("({name:?}, include_bytes!({:?})), ", root.join(name));
    }
    format!("alignprop::files::Bundle {{ mark: \"{mark:016x}\", files: &[{files}] }}")
}

/// All files below a folder.
fn list(folder: &Path, names: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the bundle") {
        let path = entry.expect("a readable folder").path();
        if path.is_dir() { list(&path, names) } else { names.push(path) }
    }
}

/// Compiles the kernels and lists them.
fn kernels(out: &Path) {
    let mut sources: Vec<PathBuf> = std::fs::read_dir(SOURCES)
        .expect("the kernels' folder")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();

    std::fs::write(out.join("cuda_signatures.rs"), signature_table(&sources)).expect("writing to OUT_DIR");
    let compiler = nvcc();
    let mut table = String::from("&[\n");
    let mut missing = None;
    std::thread::scope(|scope| {
        let tasks: Vec<_> = sources
            .iter()
            .map(|source| {
                let (compiler, target) = (&compiler, out.join(source.with_extension("fatbin").file_name().unwrap()));
                scope.spawn(move || compile(compiler, source, &target))
            })
            .collect();
        for (task, source) in tasks.into_iter().zip(&sources) {
            if let Err(message) = task.join().expect("the compiler's thread") {
                missing = Some(message);
            }
            let stem = source.file_stem().unwrap().to_str().expect("plain file names");
            table += &format!("    (\"{stem}\", include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{stem}.fatbin\"))),\n");
        }
    });
    table += "]\n";
    if let Some(message) = missing {
        println!("cargo:warning={message}: the program will have no CUDA kernels");
    }
    std::fs::write(out.join("cuda_modules.rs"), table).expect("writing to OUT_DIR");
}

/// The kernels of all sources with their parameters, as a slice in Rust.
fn signature_table(sources: &[PathBuf]) -> String {
    let mut names = HashSet::new();
    let mut table = String::from("&[\n");
    for source in sources {
        for (name, parameters) in signatures::read(source).unwrap_or_else(|message| panic!("{message}")) {
            assert!(names.insert(name.clone()), "{}: another file has a kernel named {name}", source.display());
            table += &format!("    (\"{name}\", &{parameters:?}),\n");
        }
    }
    table + "]\n"
}

/// The compiler, by the environment.
fn nvcc() -> OsString {
    if let Some(path) = std::env::var_os("NVCC") {
        return path;
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
    let mut candidates = homes.map(|home| Path::new(&home).join("bin/nvcc"));
    candidates.find(|path| path.exists()).map_or_else(|| "nvcc".into(), PathBuf::into_os_string)
}

/// Compiles one source. `Err` says why an empty module stands in for it; a source with an error in it ends the build.
fn compile(compiler: &OsString, source: &Path, target: &Path) -> Result<(), String> {
    let _ = std::fs::remove_file(target);
    let mut command = Command::new(compiler);
    command.args(["--fatbin", "-std=c++17", "-O3"]).args(architectures()).arg("-o").arg(target).arg(source);
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            std::fs::write(target, []).expect("writing to OUT_DIR");
            return Err(format!("{} cannot be run ({error}), install CUDA 12 or 13 or set NVCC", compiler.display()));
        }
    };
    assert!(
        output.status.success(),
        "{command:?} failed:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    if std::fs::metadata(target).map_or(0, |file| file.len()) == 0 {
        std::fs::write(target, []).expect("writing to OUT_DIR");
        return Err(format!("{} made nothing", compiler.display()));
    }
    Ok(())
}

/// `-gencode` for the oldest card and for H100; PTX of the oldest for everything newer.
fn architectures() -> Vec<String> {
    let digits = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_default().replace('.', "");
    let oldest = match digits.trim().parse::<u32>() {
        Ok(capability) => {
            assert!(capability >= 80, "CUDA_COMPUTE_CAP={capability}: the kernels need 8.0 (A100, RTX 30) or newer");
            capability
        }
        Err(_) => 80,
    };
    let mut flags = vec![format!("-gencode=arch=compute_{oldest},code=[compute_{oldest},sm_{oldest}]")];
    if oldest < 90 {
        flags.push("-gencode=arch=compute_90,code=sm_90".into());
    }
    flags
}
