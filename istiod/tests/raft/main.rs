//! Raft as istiod drives it: the log on a disk that fails, one member that is killed, three members that lose each
//! other.

mod cluster;
mod killed;
mod log;
mod member;
mod mesh;
mod toy;
