//! The data plane: what a control plane says becomes tables, and tables decide what happens to traffic.
pub mod tables;
pub mod xds;
