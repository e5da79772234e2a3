//! A Consul catalog as a source: every failure against a fake, whose conversations a real Consul has too.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "what is not there has failed the test")]

mod conformance;
mod export;
mod export_matrix;
mod export_world;
mod instances;
mod leader;
mod matrix;
mod scale;
mod split;
mod world;
