//! Whatever happens to a catalog that the mesh writes into, its entries are there again soon, and others' stay.

use std::time::Duration;

use registry::source::consul::answer::Node;
use registry::source::consul::convert::OWNER;
use registry::source::consul::export::EPOCH;
use registry::source::consul::export::desired::Desired;
use serde_json::json;

use crate::export_world::{World, entries, entry, settings};
use crate::world::{MINUTE, SECOND};
use tests::consul::catalog::{Catalog, Response};

/// Somebody else's service on our node.
fn theirs(consul: &mut Catalog) {
    let service = json!({"ID": "theirs", "Service": "theirs", "Address": "10.9.9.9", "Port": 1});
    let body = json!({"Node": "mesh-m1", "Address": "", "SkipNodeUpdate": true, "Service": service});
    assert!(consul.register(&body));
}

#[test]
fn what_changes_in_the_mesh_is_in_the_catalog_at_once() {
    let mut world = World::written(&entries(0, 3));
    world.run(5 * MINUTE);
    let mut desired = entries(1, 3);
    desired.get_mut("s0001-1").unwrap().meta.insert("mesh-healthy".to_owned(), "false".to_owned());
    world.desire(0, &desired);
    world.run(SECOND / 10);
    let node = world.node().unwrap();
    assert_eq!(node.services.keys().collect::<Vec<_>>(), ["s0001-1", "s0002-1", "s0003-1"]);
    assert_eq!(node.services["s0001-1"].meta["mesh-healthy"], "false");
    assert!(world.status(0).synced, "{:?}", world.status(0));
}

#[test]
fn a_quiet_mesh_asks_seldom_and_renews_its_lease() {
    let mut world = World::written(&entries(0, 100));
    let from = world.calls.len();
    let claimed = world.node().unwrap().index;
    world.run(20 * MINUTE);
    assert!(world.count(from, "GET") <= 20 * 6 + 10, "{}", world.count(from, "GET"));
    assert!((3..=5).contains(&world.count(from, "PUT")), "{}", world.count(from, "PUT"));
    assert!(world.node().unwrap().index > claimed);
}

#[test]
fn entries_that_somebody_removes_are_there_again_at_once() {
    let mut world = World::written(&entries(0, 10));
    world.run(MINUTE);
    world.consul.deregister(&json!({"Node": "mesh-m1", "ServiceID": "s0003-1"}));
    world.run(2 * SECOND);
    assert_eq!(world.ours(), 10);
    world.consul.deregister(&json!({"Node": "mesh-m1"}));
    world.run(2 * SECOND);
    assert_eq!(world.ours(), 10, "{:?}", world.status(0));
}

#[test]
fn of_two_owners_at_once_the_later_one_writes_and_the_other_leaves() {
    let mut world = World::written(&entries(0, 100));
    theirs(&mut world.consul);
    // The old owner goes on, with a mesh that lacks half; the new one knows all.
    let new = world.join(2, &entries(0, 200));
    world.desire(0, &entries(0, 50));
    world.run(MINUTE);
    for round in 0..5 {
        world.desire(0, &entries(round, 20));
        world.run(MINUTE);
        assert_eq!(world.ours(), 201);
    }
    let status = world.status(0);
    assert!(status.conflicts[0].contains("later epoch 2"), "{status:?}");
    assert!(world.status(new).conflicts[0].contains("theirs"), "{:?}", world.status(new));
    assert!(world.node().unwrap().services.contains_key("theirs"));
}

#[test]
fn a_writer_that_is_killed_between_its_transactions_leaves_nothing_half_and_nothing_late() {
    for late in [Duration::ZERO, SECOND, MINUTE] {
        let mut world = World::new();
        world.join(1, &entries(0, 200));
        // The claim and three transactions, of which the last is under way.
        world.run_until(MINUTE, |world| world.members[0].sent == 4);
        let half = world.ours();
        assert!((1..200).contains(&half), "{half}");
        theirs(&mut world.consul);
        world.kill(0, late);
        // What the successor knows is newer: the first entries are not there any more.
        world.join(2, &entries(20, 180));
        world.run(2 * SECOND);
        assert_eq!((world.ours(), world.status(0).synced), (181, false), "{:?}", world.status(0));
        world.run(2 * MINUTE);
        let node = world.node().unwrap();
        assert_eq!(node.services.len(), 181, "nothing comes back");
        assert!(node.services.contains_key("theirs") && node.meta[EPOCH] == "2", "{:?}", node.meta);
        assert_eq!(world.status(0).failure, None);
    }
}

#[test]
fn a_catalog_that_is_restored_to_before_is_whole_again_after_one_cycle() {
    let mut world = World::new();
    let empty = world.consul.clone();
    world.join(1, &entries(0, 40));
    world.run(SECOND);
    theirs(&mut world.consul);
    let early = world.consul.clone();
    world.desire(0, &entries(10, 190));
    world.run(MINUTE);
    let whole = world.node().unwrap();
    assert_eq!(whole.services.len(), 191);
    let ours = |node: &Node| {
        node.services.values().filter(|e| e.meta.contains_key(OWNER)).cloned().collect::<Vec<_>>()
    };
    // Whoever waits for a change is told of it, or asks just then with an index that is not reached again for long.
    for (before, told) in [(&early, true), (&empty, true), (&early, false), (&empty, false)] {
        if told {
            world.restore(before.clone());
        } else {
            world.consul = before.clone();
        }
        world.run(if told { 3 * SECOND } else { 15 * SECOND });
        assert_eq!(ours(&world.node().unwrap()), ours(&whole));
        world.run(MINUTE);
    }
}

#[test]
fn a_node_of_somebody_else_is_left_alone_and_told() {
    let mut world = World::new();
    let service = json!({"ID": "a", "Service": "a", "Port": 1});
    let body = json!({"Node": "mesh-m1", "Address": "10.0.0.1", "NodeMeta": {"mesh-owner": "m2"}, "Service": service});
    assert!(world.consul.register(&body));
    let before = world.node();
    world.join(1, &entries(0, 5));
    world.run(10 * MINUTE);
    assert_eq!((world.node(), world.count(0, "PUT")), (before, 0));
    assert!(world.status(0).conflicts[0].contains("is owned by m2"), "{:?}", world.status(0));
    world.consul.deregister(&json!({"Node": "mesh-m1"}));
    world.run(5 * SECOND);
    assert_eq!((world.ours(), world.status(0).conflicts.len()), (5, 0));
}

#[test]
fn not_more_is_written_in_a_second_than_is_allowed_and_not_much_removed_in_a_minute() {
    let mut world = World::new();
    world.join_with(settings(), 1, &entries(0, 500));
    world.run(5 * SECOND);
    assert!((200..=350).contains(&world.ours()), "{} at 50 in a second", world.ours());
    assert!(world.status(0).waiting > 0);
    world.run(7 * SECOND);
    assert_eq!((world.ours(), world.status(0).waiting), (500, 0));
    world.desire(0, &Desired::new());
    world.run(SECOND);
    assert_eq!((world.ours(), world.status(0).deferred), (450, 450));
    world.run(10 * MINUTE);
    assert_eq!((world.ours(), world.status(0).deferred), (0, 0));
}

#[test]
fn an_entry_that_consul_refuses_is_told_and_the_others_are_written() {
    let mut world = World::new();
    let mut desired = entries(0, 100);
    desired.get_mut("s0040-1").unwrap().address = "0.0.0.0".to_owned();
    desired.get_mut("s0090-1").unwrap().address = "0.0.0.0".to_owned();
    world.join(1, &desired);
    world.run(10 * SECOND);
    assert_eq!(world.ours(), 98);
    let problems = world.status(0).problems;
    assert!(problems.len() == 2 && problems[0].starts_with("s0040-1: Consul refused it"), "{problems:?}");
    let from = world.calls.len();
    world.run(MINUTE);
    assert_eq!(world.count(from, "PUT"), 0, "it is not tried again and again");
    world.desire(0, &entries(0, 100));
    world.run(SECOND);
    assert_eq!((world.ours(), world.status(0).problems.len()), (100, 0));
}

#[test]
fn servers_that_fail_are_asked_less_and_less_and_what_is_due_is_written_then() {
    for status in [429, 500, 503] {
        let mut world = World::written(&entries(0, 10));
        world.fault = Some(Box::new(move |_, _| Some(Response::error(status, "No cluster leader"))));
        let refused = world.consul.clone();
        world.desire(0, &entries(0, 20));
        world.run(10 * MINUTE);
        assert!(world.calls.len() < 300, "{status}: {} calls", world.calls.len());
        assert!(world.status(0).failure.unwrap().contains("No cluster leader"));
        world.fault = None;
        world.restore(refused);
        world.run(2 * MINUTE);
        assert_eq!((world.ours(), world.status(0).failure), (20, None), "{status}");
    }
}

#[test]
fn answers_that_are_lost_cost_nothing_but_time() {
    let mut world = World::new();
    let mut lost = 0;
    world.fault = Some(Box::new(move |request, response| {
        lost += usize::from(request.method == "PUT");
        (request.method != "PUT" || lost % 2 == 0).then_some(response)
    }));
    world.join(1, &entries(0, 200));
    world.run(2 * MINUTE);
    assert_eq!((world.ours(), world.status(0).synced), (200, true), "{:?}", world.status(0));
}

#[test]
fn without_the_right_token_nothing_is_written_and_the_next_token_is_taken_up() {
    let mut world = World::new();
    world.consul.tokens = ["good".to_owned()].into();
    world.join(1, &entries(0, 5));
    world.run(10 * MINUTE);
    assert!(world.status(0).failure.unwrap().contains("403"), "told");
    assert!(world.calls.len() < 60, "{}", world.calls.len());
    // The fake looks at tokens of requests; here everybody may again.
    world.consul.tokens.clear();
    world.credentials(0);
    world.run(SECOND);
    assert_eq!((world.ours(), world.status(0).failure), (5, None));
}

#[test]
fn a_token_that_does_not_show_what_was_written_does_not_make_a_busy_loop() {
    let mut world = World::new();
    world.fault = Some(Box::new(|request, mut response| {
        if request.method == "GET" && response.status == 200 && response.body != b"null" {
            let mut body: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
            body["Services"] = json!({});
            response.body = body.to_string().into_bytes();
        }
        Some(response)
    }));
    world.join(1, &entries(0, 5));
    world.run(10 * MINUTE);
    assert!(world.count(0, "PUT") < 60, "{}", world.count(0, "PUT"));
    assert!(world.status(0).failure.unwrap().contains("the token may not read it"), "{:?}", world.status(0));
    // Newer servers say so.
    world.fault =
        Some(Box::new(|_, response| Some(response.with("x-consul-results-filtered-by-acls", Some("true")))));
    let (from, before) = (world.calls.len(), world.node());
    world.run(10 * MINUTE);
    assert!(world.status(0).failure.unwrap().contains("filtered by ACLs"), "{:?}", world.status(0));
    assert!(world.count(from, "PUT") < 10, "{}", world.count(from, "PUT"));
    assert_eq!(world.node().unwrap().services.len(), before.unwrap().services.len());
}

#[test]
fn a_transaction_that_takes_long_does_not_undo_what_came_after_it() {
    let mut world = World::written(&entries(0, 5));
    world.members[0].late = 30 * SECOND;
    world.desire(0, &entries(0, 6));
    world.run(SECOND);
    world.members[0].late = Duration::ZERO;
    world.desire(0, &entries(1, 6));
    world.run(MINUTE);
    let node = world.node().unwrap();
    assert_eq!(
        node.services.keys().cloned().collect::<Vec<_>>(),
        entries(1, 6).into_keys().collect::<Vec<_>>()
    );
    assert_eq!(node.services["s0006-1"].address, entry(6).address);
}
