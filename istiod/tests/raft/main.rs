//! Raft as istiod drives it: the log on a disk that fails, one member that is killed, three members that lose each
//! other.

#[cfg(test)]
mod backup;
#[cfg(test)]
mod cluster;
#[cfg(test)]
mod killed;
#[cfg(test)]
mod log;
#[cfg(test)]
mod member;
#[cfg(test)]
mod mesh;
#[cfg(test)]
mod peers;
#[cfg(test)]
mod processes;
#[cfg(test)]
mod recorded;
#[cfg(test)]
mod toy;
