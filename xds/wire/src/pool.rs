//! The descriptors of every message in `envoy-types`, decoded once.

use std::io::Read;
use std::sync::LazyLock;

use prost_reflect::DescriptorPool;

/// The `FileDescriptorSet` that `envoy-types` was generated from, gzipped. A test holds it to the crate's version.
const DESCRIPTORS: &[u8] = include_bytes!("../assets/envoy-types.bin.gz");

static POOL: LazyLock<Result<DescriptorPool, String>> = LazyLock::new(|| {
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(DESCRIPTORS).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    DescriptorPool::decode(bytes.as_slice()).map_err(|e| e.to_string())
});

/// The pool, or why the embedded descriptors could not be read.
pub(crate) fn pool() -> Result<&'static DescriptorPool, &'static str> {
    POOL.as_ref().map_err(String::as_str)
}
