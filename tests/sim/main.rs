//! Simulation: a control plane of three to five members in one process, on a clock, a network and disks that one seed
//! decides.
//!
//! What runs is istiod's own: its driver, its log, its snapshots, its state machine and its messages as bytes. Around
//! them, from the outside in: [`plan`] is what a seed decides beforehand, [`world`] is the queue of what happens when,
//! [`faults`] is what goes wrong, [`clients`] ask and [`tests::history`] judges what they were told, [`proxies`]
//! hold streams, [`member`] is one member,
//! and [`power`], [`disk`], [`store`], [`log`], [`machine`] and [`network`] are what its driver stands on. [`ledger`]
//! holds the invariants, and [`mistake`] the known mistakes that prove that the rig finds some.
//!
//! `SIM_SEEDS=20000 cargo test --profile quick -p tests --test sim seeds` runs as many seeds as it says, from
//! `SIM_SEED_START` on. A seed that fails prints the command that replays it.

#[cfg(test)]
mod clients;
#[cfg(test)]
mod disk;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod journal;
#[cfg(test)]
mod ledger;
#[cfg(test)]
mod log;
#[cfg(test)]
mod machine;
#[cfg(test)]
mod member;
#[cfg(test)]
mod mistake;
#[cfg(test)]
mod network;
#[cfg(test)]
mod plan;
#[cfg(test)]
mod power;
#[cfg(test)]
mod proxies;
#[cfg(test)]
mod run;
#[cfg(test)]
mod seeds;
#[cfg(test)]
mod store;
#[cfg(test)]
mod world;
