use super::*;
use crate::model::service::SourceId;

#[expect(clippy::disallowed_methods, reason = "an arbitrary origin; the tests add to it")]
fn origin() -> Instant {
    Instant::now()
}

fn machine(t0: Instant) -> Datacenter {
    let settings = Settings::new(Mapping::new("c", "dc1"), 2);
    Datacenter::new(settings, Catalog::default(), fastrand::Rng::with_seed(1), t0)
}

fn asks(actions: &[Action]) -> Vec<&Query> {
    let asks = actions.iter().filter_map(|action| match action {
        Action::Ask(query) => Some(query),
        Action::Publish(_) => None,
    });
    asks.collect()
}

fn answer(index: u64, body: &str) -> Answer {
    Answer {
        status: 200,
        index: Some(index),
        known_leader: Some(true),
        body: body.into(),
        ..Answer::default()
    }
}

#[test]
fn a_service_that_is_listed_is_asked_for_watched_and_published() {
    let t0 = origin();
    let mut machine = machine(t0);
    let first = machine.tick(t0);
    assert_eq!(asks(&first)[0].path, "/v1/catalog/services?dc=dc1&stale");
    let next = machine.on_answer(asks(&first)[0].id, &answer(5, r#"{"consul":[],"a b":[],"web":["x"]}"#), t0);
    let paths: Vec<&str> = asks(&next).iter().map(|query| query.path.as_str()).collect();
    assert_eq!(paths[0], "/v1/catalog/services?dc=dc1&stale&index=5&wait=60000ms");
    assert_eq!(paths[1..], ["/v1/health/service/web?dc=dc1&stale"]);
    let body =
        r#"[{"Node":{"Node":"n","Address":"10.0.0.1"},"Service":{"ID":"w","Service":"web","Port":80}}]"#;
    let next = machine.on_answer(asks(&next)[1].id, &answer(4, body), t0);
    assert!(asks(&next)[0].path.ends_with("&index=4&wait=60000ms"), "{next:?}");
    let published = machine.tick(t0 + Duration::from_millis(100));
    let [Action::Publish(commands)] = &published[..] else { panic!("{published:?}") };
    let source = SourceId::Consul("c/dc1".to_owned());
    let said = |command: &Command| {
        if let Command::PutService { service } = command {
            return format!("+{}", service.hostname);
        }
        let Command::ReplaceEndpoints { host, endpoints, source: by } = command else {
            panic!("{command:?}")
        };
        assert_eq!(*by, source);
        format!("{host} {}", endpoints.len())
    };
    let hosts: Vec<String> = commands.iter().map(said).collect();
    let expect = [
        "+web.service.dc1.consul",
        "web.service.dc1.consul 1",
        "+web.service.consul",
        "web.service.consul 1",
    ];
    assert_eq!(hosts, expect);
    assert!(!machine.status(t0).synced);
    machine.on_published(true, t0);
    let status = machine.status(t0);
    assert!(status.synced && status.problems[0].starts_with("a b: "), "{status:?}");
}

#[test]
fn what_could_not_be_published_is_published_again() {
    let t0 = origin();
    let mut machine = machine(t0);
    let first = machine.tick(t0);
    let next = machine.on_answer(asks(&first)[0].id, &answer(5, r#"{"web":[]}"#), t0);
    let web =
        r#"[{"Node":{"Node":"n"},"Service":{"ID":"w","Service":"web","Address":"10.0.0.1","Port":80}}]"#;
    machine.on_answer(asks(&next)[1].id, &answer(4, web), t0);
    let later = t0 + Duration::from_millis(100);
    let first = machine.tick(later);
    assert!(matches!(&first[..], [Action::Publish(_)]), "{first:?}");
    assert_eq!(
        machine
            .tick(later + Duration::from_secs(60))
            .iter()
            .filter(|a| matches!(a, Action::Publish(_)))
            .count(),
        0,
        "one at a time"
    );
    machine.on_published(false, later);
    let again = machine.tick(later + Duration::from_secs(2));
    assert!(again.contains(&first[0]), "{again:?}");
}

#[test]
fn names_are_escaped_and_answers_of_nobodys_questions_change_nothing() {
    assert_eq!(escape("a/b?c=ä&"), "a%2Fb%3Fc%3D%C3%A4%26");
    let t0 = origin();
    let mut machine = machine(t0);
    let first = machine.tick(t0);
    assert_eq!(machine.on_answer(99, &answer(1, "{}"), t0), vec![]);
    machine.on_failure(asks(&first)[0].id, "cut", t0);
    assert_eq!(machine.status(t0).failures, 1);
}
