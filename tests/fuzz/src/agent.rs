//! Parsers of the agent.

use std::net::IpAddr;

use agent::dns::message::{Code, Query};
use agent::dns::names::{Found, Table};
use prost::Message as _;
use wire::mesh::Names;

use crate::dns_message::{Reply, reply};

/// Queries of applications: what is answered is within its bounds, and our own client reads it.
pub fn dns_query(bytes: &[u8]) {
    let query = match Query::parse(bytes) {
        Ok(query) => query,
        Err(refused) => {
            assert!(refused.is_none_or(|answer| answer.len() == 12 && answer[..2] == bytes[..2]));
            return;
        }
    };
    assert!(query.name.len() <= 255);
    let addresses: Vec<IpAddr> = vec!["10.0.0.1".parse().expect("v4"), "fd00::1".parse().expect("v6")];
    let many = addresses.repeat(100);
    for (told, limit) in [(&addresses, false), (&addresses, true), (&many, true), (&many, false)] {
        let answer = query.answer(Code::NoError, told, limit);
        assert!(!limit || answer.len() <= 1232);
        assert_eq!(Query::parse(&answer), Err(None), "an answer is no query");
        if let Some(Reply::Addresses(found, _)) = reply(bytes, &answer) {
            assert!(found.iter().all(|address| told.contains(address)));
        }
    }
}

/// The names that the control plane tells.
pub fn names(bytes: &[u8]) {
    let Ok(told) = Names::decode(bytes) else { return };
    let table = Table::new(told.clone());
    assert!(table.len() <= told.names.len());
    for name in &told.names {
        let exact = name.host.strip_prefix("*.").is_none();
        assert!(!exact || matches!(table.find(&name.host), Found::Addresses(_)), "{}", name.host);
    }
}
