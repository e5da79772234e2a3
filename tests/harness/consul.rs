//! Consul: real servers, and a fake that does what it is told, also wrongly.

#[expect(clippy::indexing_slicing, reason = "what is not there has failed the test")]
pub mod catalog;
#[expect(clippy::unwrap_used, reason = "a lock whose holder panicked has failed the test")]
pub mod fake;
#[expect(clippy::indexing_slicing, reason = "an object of JSON, which takes new fields so")]
pub mod real;
#[expect(clippy::indexing_slicing, reason = "an object of JSON, which takes new fields so")]
pub mod servers;
