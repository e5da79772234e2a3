//! What an object is once it is written: how long, and its digest.

use std::sync::{Arc, OnceLock};

use ca::authn::Hash;

use super::Object;

/// An object in its Kubernetes form as compact JSON, measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Its length in bytes.
    pub bytes: usize,
    /// Its SHA-256.
    pub digest: Hash,
}

/// Where an object keeps what it measured. A copy measures again: it may be about to change.
#[derive(Debug, Default)]
pub(super) struct Memo(OnceLock<Written>);

impl Clone for Memo {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// It says nothing that the rest of the object does not.
impl PartialEq for Memo {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Object {
    /// The object as it is written, measured once: history counts its bytes before and after each change, the audit
    /// trail has its digest. Only of a shared object, which changes no more.
    #[must_use]
    pub fn written(self: &Arc<Self>) -> Written {
        *self.memo.0.get_or_init(|| {
            // Texts and numbers always have a JSON form.
            let json = serde_json::to_vec(&**self).unwrap_or_default();
            Written { bytes: json.len(), digest: Hash::of(&json) }
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::Kind;

    #[test]
    fn a_copy_that_changes_is_measured_by_itself() {
        let object = Arc::new(Object::new(Kind::Sidecar, "default", "a", json!({})));
        let written = object.written();
        let json = serde_json::to_vec(&*object).unwrap();
        assert_eq!(written, Written { bytes: json.len(), digest: Hash::of(&json) });
        let longer = Arc::new(Object { name: "aa".to_owned(), ..Object::clone(&object) });
        assert_eq!(longer.written().bytes, written.bytes + 1);
        assert_eq!(object.written(), written);
        assert_eq!(*object, Object::clone(&object), "measured or not, it is the same object");
    }
}
