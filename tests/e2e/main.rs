//! End to end: the real programs as processes, on loopback addresses.

mod commands;
mod demo;
mod failover;
mod fleet;
mod garbage;
mod joining;
mod member;
mod operate;
mod probes;
mod refusal;
mod revocation;
mod security;
mod survival;
mod traffic;
mod upgrade;
