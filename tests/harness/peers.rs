//! What `tests/run` installed.

use std::path::PathBuf;

/// Path of a peer's program, `envoy/envoy`.
///
/// # Errors
///
/// With the command that installs it.
pub fn find(program: &str) -> anyhow::Result<PathBuf> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers");
    #[expect(clippy::disallowed_methods, reason = "the harness's one setting, made by tests/run")]
    let root = std::env::var("MESH_PEERS").map_or(root, PathBuf::from);
    let path = root.join(program);
    anyhow::ensure!(path.exists(), "{} is not there; `tests/run` installs it", path.display());
    Ok(path)
}
