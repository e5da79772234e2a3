//! What `tests/run` installed.

use std::path::PathBuf;

/// Path of a peer's program, `envoy/envoy`.
///
/// # Errors
///
/// With the command that installs it.
pub fn find(program: &str) -> Result<PathBuf, String> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers");
    #[expect(clippy::disallowed_methods, reason = "the harness's one setting, made by tests/run")]
    let root = std::env::var("MESH_PEERS").map_or(root, PathBuf::from);
    let path = root.join(program);
    if path.exists() { Ok(path) } else { Err(format!("{} is not there; `tests/run` installs it", path.display())) }
}
