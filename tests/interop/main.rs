//! Beside others: a stock Envoy as data plane of our control plane, and as the oracle for our own proxy.

mod alone;
#[cfg(test)]
mod generated;
mod health;
mod inbound;
mod names;
mod oracle;
mod outbound;
<<<<<<< HEAD
mod overload;
=======
#[cfg(test)]
mod scenarios;
>>>>>>> 2268cd1 (Compare our proxy with Envoy in more than 150 scenarios that are data: faults, mirrors, timeouts, retries, breakers, outliers, balancing, hashing, headers, routing, protocols and connections)
mod seat;
mod websocket;
