//! Beside others: a stock Envoy as data plane of our control plane, and as the oracle for our own proxy.

mod alone;
#[cfg(test)]
mod generated;
mod health;
mod inbound;
mod names;
mod oracle;
mod outbound;
mod overload;
#[cfg(test)]
mod scenarios;
mod seat;
mod websocket;
