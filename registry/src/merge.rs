//! (merge)
