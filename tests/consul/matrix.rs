//! Whatever a Consul cluster does, nothing that serves is taken away without need, and nothing waits for ever.

use std::collections::BTreeSet;
use std::time::Duration;

use registry::model::service::Health;
use serde_json::json;

use crate::world::{MINUTE, SECOND, World, address, json_of, known, of_web, registration, settings, web};
use tests::consul::catalog::{Catalog, Request, Response};

fn of_list(request: &Request) -> bool {
    request.path == "/v1/catalog/services"
}

/// Questions since `from` whose path contains `part`.
fn questions(world: &World, from: usize, part: &str) -> usize {
    world.asked[from..].iter().filter(|(_, _, path)| path.contains(part)).count()
}

#[test]
fn what_changes_in_the_catalog_is_in_the_mesh_within_a_second() {
    let mut world = web();
    world.run(5 * MINUTE);
    world.register("web", "w2", "10.0.0.2");
    world.register("db", "d1", "10.0.1.1");
    world.run(SECOND);
    assert_eq!(world.addresses("web"), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(world.addresses("db"), ["10.0.1.1"]);
    world.check("web", "w1", "10.0.0.1", "critical");
    world.run(SECOND);
    assert_eq!(world.endpoints("web")[0].health, Health::Unhealthy);
    world.deregister("w1");
    world.run(SECOND);
    assert_eq!(world.addresses("web"), ["10.0.0.2"]);
}

#[test]
fn a_service_that_is_deregistered_loses_its_endpoints_within_seconds_and_later_itself() {
    let mut world = known(3);
    world.deregister("i0001");
    world.run(3 * SECOND);
    assert_eq!(world.addresses("s0001"), [""; 0]);
    assert_eq!(world.hosts().len(), 3, "whoever resolved its name gets an answer for a while");
    world.run(MINUTE);
    assert_eq!(world.hosts(), ["s0000.service.consul", "s0002.service.consul"]);
}

#[test]
fn an_index_that_goes_backwards_is_followed_after_the_leader_confirmed_it() {
    let mut world = web();
    world.fault = Some(Box::new(|_, request, response| {
        let lower = request.index().is_some() && !request.query.contains_key("consistent");
        Some(if lower { response.with("x-consul-index", Some("1")) } else { response })
    }));
    let from = world.asked.len();
    world.register("web", "w2", "10.0.0.2");
    world.run(5 * SECOND);
    assert_eq!(world.addresses("web").len(), 2);
    assert!(questions(&world, from, "web?dc=dc1&consistent") >= 1);
}

#[test]
fn an_index_of_0_or_none_does_not_make_a_busy_loop() {
    for index in [Some("0"), None, Some("-1"), Some("x")] {
        let mut world = web();
        world.fault = Some(Box::new(move |_, _, response| Some(response.with("x-consul-index", index))));
        let from = world.asked.len();
        world.register("web", "w2", "10.0.0.2");
        world.run(2 * MINUTE);
        assert_eq!(world.addresses("web").len(), 2, "{index:?}");
        assert!(
            world.asked.len() - from < 260,
            "{index:?}: {} questions in two minutes",
            world.asked.len() - from
        );
    }
}

#[test]
fn the_same_index_with_new_content_is_taken_over_at_the_next_look() {
    let mut world = web();
    let index = world.consul.read(&Request::get("/v1/health/service/web")).1.to_string();
    world.fault = Some(Box::new(move |_, request, response| {
        Some(if of_web(request) { response.with("x-consul-index", Some(&index)) } else { response })
    }));
    world.register("web", "w2", "10.0.0.2");
    world.run(SECOND);
    assert_eq!(world.addresses("web").len(), 2);
}

#[test]
fn a_new_index_with_the_same_content_changes_nothing() {
    let mut world = web();
    let mut index = 1000;
    world.fault = Some(Box::new(move |_, _, response| {
        index += 1;
        Some(response.with("x-consul-index", Some(&index.to_string())))
    }));
    let published = world.published.len();
    world.run(10 * MINUTE);
    assert_eq!(world.published.len(), published);
}

#[test]
fn a_server_that_does_not_wait_is_asked_at_a_bounded_rate() {
    let mut world = web();
    world.fault = Some(Box::new(|_, _, response| Some(response)));
    let now = world.consul.clone();
    world.run(SECOND);
    let from = world.asked.len();
    // Every question is answered at once, as if its index were always passed.
    let mut index = 10_000;
    for _ in 0..120 {
        index += 1;
        let told = index.to_string();
        world.fault =
            Some(Box::new(move |_, _, response| Some(response.with("x-consul-index", Some(&told)))));
        world.put(&json!({"Node": "other", "Address": "10.9.9.9", "NodeMeta": {"n": index.to_string()}}));
        world.run(SECOND);
    }
    assert!(world.asked.len() - from < 400, "{}", world.asked.len() - from);
    assert_eq!(json_of(&now.read(&Request::get("/v1/catalog/services")).0)["web"], json!(["a", "b"]));
}

#[test]
fn a_body_that_is_cut_is_no_answer() {
    let mut world = web();
    world.fault = Some(Box::new(|_, _, mut response| {
        response.body.truncate(response.body.len() / 2);
        Some(response)
    }));
    world.register("web", "w2", "10.0.0.2");
    world.run(MINUTE);
    assert_eq!(world.addresses("web"), ["10.0.0.1"]);
    assert!(world.status().failures > 0 && world.asked.len() < 300, "{}", world.asked.len());
    world.fault = None;
    world.run(2 * MINUTE);
    assert_eq!(world.addresses("web").len(), 2);
}

#[test]
fn errors_of_servers_are_tried_elsewhere_and_keep_what_is_known() {
    for status in [429, 500, 503] {
        let mut world = web();
        world.fault = Some(Box::new(move |server, _, response| {
            let refused =
                Response::error(status, "rpc error: No cluster leader").with("retry-after", Some("1"));
            Some(if server == 0 { refused } else { response })
        }));
        world.restore(world.consul.clone());
        world.register("web", "w2", "10.0.0.2");
        world.run(3 * SECOND);
        assert_eq!(world.addresses("web").len(), 2, "{status}: another server serves");
        world.fault = Some(Box::new(move |_, _, _| Some(Response::error(status, "No cluster leader"))));
        world.restore(world.consul.clone());
        let from = world.asked.len();
        world.run(10 * MINUTE);
        assert_eq!(world.addresses("web").len(), 2, "{status}");
        assert!(world.asked.len() - from < 400, "{status}: {} questions", world.asked.len() - from);
        let told = world.status();
        assert!(told.age > 9 * MINUTE && told.failure.is_some(), "{told:?}");
        world.fault = None;
        world.run(2 * MINUTE);
        assert_eq!(world.status().age, Duration::ZERO, "{status}");
    }
}

#[test]
fn a_token_that_is_refused_freezes_and_a_new_one_thaws() {
    let mut world = known(3);
    world.consul.tokens = ["good".to_owned()].into();
    world.deregister("i0000");
    world.restore(world.consul.clone());
    world.run(5 * MINUTE);
    assert_eq!(world.hosts().len(), 3);
    assert_eq!(world.addresses("s0000").len(), 1);
    assert!(world.status().frozen.unwrap().contains("403"), "told");
    // The fake looks at tokens of requests; here everybody may again.
    world.consul.tokens = BTreeSet::new();
    world.credentials();
    world.run(2 * MINUTE);
    assert_eq!(world.hosts().len(), 2);
    assert_eq!(world.status().frozen, None);
}

#[test]
fn results_filtered_by_acls_remove_nothing() {
    let mut world = known(30);
    world.fault = Some(Box::new(|_, request, mut response| {
        response.body = if of_list(request) { b"{\"s0001\":[]}".to_vec() } else { b"[]".to_vec() };
        Some(response.with("x-consul-results-filtered-by-acls", Some("true")))
    }));
    world.restore(world.consul.clone());
    world.run(10 * MINUTE);
    assert_eq!((world.hosts().len(), world.status().endpoints), (30, 30));
    assert!(world.status().frozen.unwrap().contains("filtered"));
}

#[test]
fn services_whose_instances_are_hidden_keep_them_while_they_are_listed() {
    // An old server with a token that may read services but no nodes says so nowhere.
    let mut world = known(5);
    world.fault = Some(Box::new(|_, request, mut response| {
        if !of_list(request) {
            response.body = b"[]".to_vec();
        }
        Some(response)
    }));
    world.restore(world.consul.clone());
    world.run(10 * MINUTE);
    assert_eq!((world.hosts().len(), world.status().endpoints), (5, 5));
    assert!(world.status().problems[0].contains("listed, but without instances"), "{:?}", world.status());
}

#[test]
fn an_empty_catalog_after_a_full_one_is_held_until_servers_agree() {
    let mut world = known(40);
    let full = world.consul.clone();
    world.restore(Catalog::new("dc1"));
    world.run(15 * SECOND);
    assert_eq!((world.hosts().len(), world.status().endpoints), (40, 40));
    assert!(world.status().held >= 40, "{:?}", world.status());
    world.restore(full);
    world.run(2 * MINUTE);
    assert_eq!((world.hosts().len(), world.status().endpoints, world.status().held), (40, 40, 0));
    // It stays empty: that is what the operator wants.
    world.restore(Catalog::new("dc1"));
    world.run(5 * MINUTE);
    assert_eq!(world.hosts(), [""; 0]);
}

#[test]
fn a_list_without_even_consul_itself_is_held_for_any_size() {
    let mut world = known(2);
    world.fault = Some(Box::new(|server, _, mut response| {
        if server == 0 {
            response.body = if response.body.starts_with(b"{") { b"{}".to_vec() } else { b"[]".to_vec() };
        }
        Some(response)
    }));
    world.restore(world.consul.clone());
    world.run(10 * MINUTE);
    assert_eq!((world.hosts().len(), world.status().endpoints), (2, 2), "one server alone is not believed");
}

#[test]
fn a_server_without_a_leader_is_left_for_another() {
    let mut world = web();
    world.fault = Some(Box::new(|server, _, response| {
        let known = if server == 2 { "true" } else { "false" };
        Some(response.with("x-consul-knownleader", Some(known)))
    }));
    world.register("web", "w2", "10.0.0.2");
    world.restore(world.consul.clone());
    world.run(MINUTE);
    assert_eq!(world.addresses("web").len(), 2);
    assert_eq!(world.asked.last().unwrap().1, 2);
}

#[test]
fn an_answer_of_a_server_that_lost_its_leader_long_ago_is_refused() {
    let mut world = web();
    world.fault =
        Some(Box::new(|_, _, response| Some(response.with("x-consul-lastcontact", Some("3600000")))));
    world.register("web", "w2", "10.0.0.2");
    world.run(MINUTE);
    assert_eq!(world.addresses("web"), ["10.0.0.1"]);
    assert!(world.status().age > Duration::from_secs(30), "{:?}", world.status());
}

#[test]
fn servers_that_disagree_do_not_take_turns() {
    let mut world = web();
    let old = world.consul.clone();
    world.register("web", "w2", "10.0.0.2");
    world.run(SECOND);
    let published = world.published.len();
    // One server lags: it answers from earlier, with a lower index.
    world.fault = Some(Box::new(move |server, request, response| {
        let lags = server == 0 && !request.query.contains_key("consistent");
        Some(if lags { old.read(request).0 } else { response })
    }));
    world.restore(world.consul.clone());
    world.run(10 * MINUTE);
    assert_eq!(world.addresses("web").len(), 2);
    assert_eq!(world.published.len(), published);
}

#[test]
fn a_change_of_leader_in_the_middle_of_a_poll_is_asked_again() {
    let mut world = web();
    for n in 2..6 {
        world.register("web", &format!("w{n}"), &address(n));
        world.restore(world.consul.clone());
        world.run(3 * SECOND);
        assert_eq!(world.addresses("web").len(), n);
    }
    assert_eq!(world.status().failure, None);
}

#[test]
fn servers_that_were_all_replaced_are_found_again() {
    let mut world = known(20);
    world.fault = Some(Box::new(|_, _, _| None));
    world.restore(world.consul.clone());
    world.run(5 * MINUTE);
    assert_eq!((world.hosts().len(), world.status().endpoints), (20, 20));
    world.fault = None;
    world.register("new", "n", "10.0.9.9");
    world.run(MINUTE);
    assert_eq!(world.addresses("new").len(), 1);
    assert!(world.status().synced && world.status().age == Duration::ZERO, "{:?}", world.status());
}

#[test]
fn a_datacenter_that_is_gone_keeps_its_services() {
    let mut world = known(3);
    world.restore(Catalog::new("dc2"));
    world.run(10 * MINUTE);
    assert_eq!((world.hosts().len(), world.status().endpoints), (3, 3));
    assert!(world.status().failure.unwrap().contains("No path to datacenter"));
}

#[test]
fn a_service_that_was_deleted_and_made_again_with_a_lower_index_is_seen() {
    let mut world = web();
    for n in 0..50 {
        world.register("other", &format!("o{n}"), &address(n + 900));
    }
    world.run(MINUTE);
    let mut restored = Catalog::new("dc1");
    restored.register(&registration("web", "w9", "10.0.0.9", "passing"));
    for n in 0..50 {
        restored.register(&registration("other", &format!("o{n}"), &address(n + 900), "passing"));
    }
    world.restore(restored);
    world.run(2 * MINUTE);
    assert_eq!(world.addresses("web"), ["10.0.0.9"]);
}

#[test]
fn ten_thousand_services_at_the_start_stay_within_the_bounds() {
    let mut settings = settings();
    settings.watches = 150;
    let mut world = World::with(settings.clone());
    for n in 0..10_000 {
        let body = registration(&format!("s{n:05}"), &format!("i{n}"), &address(n + 1), "passing");
        world.consul.register(&body);
    }
    world.run(10 * SECOND);
    assert!(world.status().synced, "{:?}", world.status());
    assert_eq!(world.hosts().len(), 10_000);
    let (blocking, others) = world.most;
    assert!(blocking <= settings.watches + 1 && others <= settings.fetches + 1, "{:?}", world.most);
}

#[test]
fn with_more_services_than_watches_each_has_its_turn() {
    let mut settings = settings();
    settings.watches = 5;
    let mut world = World::with(settings);
    for n in 0..200 {
        world.register(&format!("s{n:03}"), &format!("i{n}"), &address(n + 1));
    }
    world.run(10 * SECOND);
    let from = world.asked.len();
    world.run(2 * MINUTE);
    let asked: BTreeSet<&str> =
        world.asked[from..].iter().filter_map(|(_, _, path)| path.split('?').next()).collect();
    assert!(asked.len() >= 200, "{}", asked.len());
    world.check("s100", "i100", &address(101), "critical");
    world.run(2 * MINUTE);
    assert_eq!(world.endpoints("s100")[0].health, Health::Unhealthy);
}

#[test]
fn connections_of_three_members_stay_below_consuls_cap_of_200() {
    let mut world = known(300);
    world.restore(world.consul.clone());
    world.run(MINUTE);
    // Each may write too: one question, and one transaction.
    let member = world.most.0 + world.most.1 + 2;
    assert!(3 * member < 200, "{:?}", world.most);
}

#[test]
fn bytes_that_are_no_text_are_refused() {
    let mut world = web();
    world.fault = Some(Box::new(|_, request, mut response| {
        if of_web(request) {
            response.body.splice(10..12, [0xff, 0xfe]);
        }
        Some(response)
    }));
    world.register("web", "w2", "10.0.0.2");
    world.run(MINUTE);
    assert_eq!(world.addresses("web"), ["10.0.0.1"]);
    world.register("db", "d1", "10.0.1.1");
    world.run(30 * SECOND);
    assert_eq!(world.addresses("db").len(), 1, "others go on");
}

#[test]
fn a_check_that_flaps_ten_times_a_second_is_published_at_a_bounded_rate() {
    let mut world = web();
    let (from, published) = (world.asked.len(), world.published.len());
    for n in 0..600 {
        let status = if n % 2 == 0 { "critical" } else { "passing" };
        world.check("web", "w1", "10.0.0.1", status);
        world.run(Duration::from_millis(100));
    }
    assert!(world.published.len() - published <= 30, "{}", world.published.len() - published);
    assert!(questions(&world, from, "/web?") <= 60, "{}", questions(&world, from, "/web?"));
    world.run(10 * SECOND);
    assert_eq!(world.endpoints("web")[0].health, Health::Healthy, "the last word holds");
}

#[test]
fn a_machine_that_was_suspended_goes_on() {
    let mut world = web();
    world.now += Duration::from_secs(3 * 24 * 3600);
    world.register("web", "w2", "10.0.0.2");
    world.run(MINUTE);
    assert_eq!(world.addresses("web").len(), 2);
    assert_eq!(world.status().age, Duration::ZERO);
}

#[test]
fn a_token_that_expires_in_the_middle_of_a_watch_keeps_everything() {
    let mut world = known(15);
    world.fault = Some(Box::new(|_, _, _| Some(Response::error(403, "ACL not found"))));
    world.register("s0000", "more", "10.7.7.7");
    world.run(20 * MINUTE);
    assert_eq!((world.hosts().len(), world.status().endpoints), (15, 15));
    world.fault = None;
    world.credentials();
    world.run(5 * SECOND);
    assert_eq!(world.addresses("s0000").len(), 2, "and goes on with the next one");
}

#[test]
fn a_successor_begins_with_what_the_state_holds_and_repeats_nothing() {
    let mut world = known(50);
    let revision = world.state.revision();
    world.succeed(settings());
    world.run(2 * MINUTE);
    assert!(world.status().synced);
    assert_eq!(world.state.revision(), revision);
    // What went while nobody looked goes, in the same way as ever.
    for n in 0..3 {
        world.consul.deregister(&json!({"Node": format!("node-i{n:04}")}));
    }
    world.succeed(settings());
    world.run(2 * MINUTE);
    assert_eq!(world.hosts().len(), 47);
}

#[test]
fn a_successor_that_finds_an_empty_catalog_holds_what_the_state_has() {
    let mut world = known(50);
    world.consul = Catalog::new("dc1");
    world.succeed(settings());
    world.run(15 * SECOND);
    assert_eq!(world.hosts().len(), 50);
    assert!(world.status().held > 0, "{:?}", world.status());
}

#[test]
fn what_cannot_be_published_waits_and_is_then_published_as_it_is_then() {
    let mut world = web();
    world.publishes = false;
    for n in 2..5 {
        world.register("web", &format!("w{n}"), &address(n));
        world.run(5 * SECOND);
    }
    assert_eq!(world.addresses("web").len(), 1);
    world.publishes = true;
    world.run(2 * SECOND);
    assert_eq!(world.addresses("web").len(), 4);
}
