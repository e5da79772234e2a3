//! (snapshot)
