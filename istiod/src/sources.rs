//! Catalogs that the mesh follows. One member follows each of them: the leader of the log, from what the state holds.

pub(crate) mod consul;
