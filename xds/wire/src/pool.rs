//! The descriptors of every message in `envoy-types`, decoded when they are first needed.

use std::io::Read;
use std::sync::{Mutex, PoisonError};

use prost_reflect::DescriptorPool;

/// The `FileDescriptorSet` that `envoy-types` was generated from, gzipped. A test holds it to the crate's version.
const DESCRIPTORS: &[u8] = include_bytes!("../assets/envoy-types.bin.gz");

static POOL: Mutex<Option<DescriptorPool>> = Mutex::new(None);

/// The pool, or why the embedded descriptors could not be read.
pub(crate) fn pool() -> Result<DescriptorPool, String> {
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = &*pool {
        return Ok(pool.clone());
    }
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(DESCRIPTORS).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    let decoded = DescriptorPool::decode(bytes.as_slice()).map_err(|e| e.to_string())?;
    Ok(pool.insert(decoded).clone())
}

/// Lets go of the descriptors, which take some tens of megabytes. They are decoded again when they are needed.
pub fn forget_descriptors() {
    *POOL.lock().unwrap_or_else(PoisonError::into_inner) = None;
}
