//! Plays a script against a stream.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::google::rpc::Status;
use xds::cache::View;
use xds::resources::{Resource, Resources, Type};
use xds::stream::{Action, Response, Stream, Sync, Variant, version_text};

/// Plays a script with our own proxy, delta.
#[track_caller]
pub(crate) fn delta(script: &str) -> String {
    Conversation::new(Variant::Delta, true).play(script)
}

/// Plays a script with a native client, state of the world. Returns the last `version_info`.
#[track_caller]
pub(crate) fn whole(script: &str) -> String {
    Conversation::new(Variant::StateOfTheWorld, true).play(script)
}

/// Plays a script with stock Envoy, delta; plain names in a request are subscribed.
#[track_caller]
pub(crate) fn envoy_delta(script: &str) {
    Conversation::new(Variant::Delta, false).play(script);
}

/// The same, state of the world; of a response only what differs from the one before is compared.
#[track_caller]
pub(crate) fn envoy_whole(script: &str) {
    let mut conversation = Conversation::new(Variant::StateOfTheWorld, false);
    conversation.only_part = true;
    conversation.play(script);
}

pub(crate) fn resource(name: &str, version: u64) -> Arc<Resource> {
    let body = Any { type_url: String::new(), value: version.to_le_bytes().to_vec() };
    Arc::new(Resource { name: name.to_owned(), version, body })
}

struct Conversation {
    stream: Stream,
    variant: Variant,
    now: Instant,
    nonces: BTreeMap<String, String>,
    names: BTreeMap<String, Vec<String>>,
    version: String,
    only_part: bool,
    told: VecDeque<String>,
}

impl Conversation {
    fn new(variant: Variant, native: bool) -> Self {
        Self {
            stream: Stream::new(variant, native),
            variant,
            now: tokio::time::Instant::now().into_std(),
            nonces: BTreeMap::new(),
            names: BTreeMap::new(),
            version: String::new(),
            only_part: false,
            told: VecDeque::new(),
        }
    }

    #[track_caller]
    fn play(mut self, script: &str) -> String {
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            self.line(line);
        }
        assert!(self.told.is_empty(), "at the end, unexpected: {:?}", self.told);
        self.version
    }

    #[track_caller]
    fn line(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["<-", "nothing"] => assert!(self.told.is_empty(), "unexpected: {:?}", self.told),
            ["<-", ..] | ["rejected", ..] => {
                let told = self.told.pop_front().unwrap_or_else(|| "nothing".to_owned());
                if self.only_part && line.starts_with("<-") {
                    assert!(words.iter().all(|word| told.contains(word)), "told {told}, expected {line}");
                } else {
                    assert_eq!(told, line);
                }
            }
            ["synced", revision] => {
                assert_eq!(self.stream.synced_revision().to_string(), *revision, "{line}")
            }
            [kind, "nacked", names @ ..] => {
                let report = self.stream.report();
                let of_type = &report.types[&type_of(kind).unwrap()];
                assert_eq!(of_type.sync, Sync::Nacked);
                assert_eq!(of_type.nack.as_ref().unwrap().resources, names);
            }
            [kind, "synced"] => {
                let report = self.stream.report();
                let of_type = &report.types[&type_of(kind).unwrap()];
                assert_eq!((of_type.sync, &of_type.nack), (Sync::Synced, &None));
            }
            _ => {
                assert!(self.told.is_empty(), "before `{line}`, unexpected: {:?}", self.told);
                self.event(line, &words);
            }
        }
    }

    fn event(&mut self, line: &str, words: &[&str]) {
        let actions = match words {
            ["view", revision, rest @ ..] => {
                self.stream.on_view(Arc::new(view(revision.parse().unwrap(), rest)), self.now)
            }
            ["wait", ms] => {
                self.now += Duration::from_millis(ms.parse().unwrap());
                self.stream.on_tick(self.now)
            }
            ["->", kind, rest @ ..] => self.request(kind, rest),
            _ => panic!("what is `{line}`?"),
        };
        for action in actions {
            self.tell(action);
        }
    }

    fn request(&mut self, kind: &str, words: &[&str]) -> Vec<Action> {
        let mut names = Vec::new();
        let (mut nonce, mut error, mut versions, mut version_info) = (None, None, BTreeMap::new(), None);
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let last = self.nonces.get(kind).cloned();
            match *word {
                "ack" => nonce = last,
                "nack" => {
                    nonce = last;
                    let mut text: Vec<&str> = words.by_ref().copied().collect();
                    if text.first().is_some_and(|first| is_nonce(first)) {
                        nonce = Some(text.remove(0).to_owned());
                    }
                    error = Some(text.join(" "));
                }
                "version" => version_info = words.next().copied(),
                "has" => {
                    for word in words.by_ref() {
                        let (name, version) = word.split_once('=').unwrap();
                        versions.insert(name.to_owned(), version_text(version.parse().unwrap()));
                    }
                }
                word if is_nonce(word) => nonce = Some(word.to_owned()),
                word => names.push(word.to_owned()),
            }
        }
        let type_url = type_of(kind).map_or_else(|| kind.to_owned(), |t| t.url().to_owned());
        let response_nonce = nonce.unwrap_or_default();
        let error_detail = error.map(|message| Status { code: 13, message, details: Vec::new() });
        match self.variant {
            Variant::Delta => {
                let gone = |name: &String| name.strip_prefix('-').map(str::to_owned);
                let new =
                    |name: &String| (!name.starts_with('-')).then(|| name.trim_start_matches('+').to_owned());
                let request = DeltaDiscoveryRequest {
                    type_url,
                    resource_names_subscribe: names.iter().filter_map(new).collect(),
                    resource_names_unsubscribe: names.iter().filter_map(gone).collect(),
                    initial_resource_versions: versions.into_iter().collect(),
                    response_nonce,
                    error_detail,
                    ..DeltaDiscoveryRequest::default()
                };
                self.stream.on_delta(request, self.now)
            }
            Variant::StateOfTheWorld => {
                if names.is_empty() && !response_nonce.is_empty() {
                    names = self.names.get(kind).cloned().unwrap_or_default();
                }
                self.names.insert(kind.to_owned(), names.clone());
                let request = DiscoveryRequest {
                    version_info: version_info.unwrap_or_default().to_owned(),
                    type_url,
                    resource_names: names,
                    response_nonce,
                    error_detail,
                    ..DiscoveryRequest::default()
                };
                self.stream.on_whole(request, self.now)
            }
        }
    }

    fn tell(&mut self, action: Action) {
        match action {
            Action::Send(response) => {
                let kind = kind_of(&response.type_url);
                self.nonces.insert(kind.clone(), response.nonce.clone());
                self.version.clone_from(&response.version);
                self.told.push_back(format!("<- {kind} {}", text(&response)));
            }
            Action::Accepted { .. } => {}
            Action::Rejected(nack) => {
                let kind = kind_of(nack.type_.url());
                let told = format!("rejected {kind} {} {}", nack.revision, nack.resources.join(" "));
                self.told.push_back(told);
            }
        }
    }
}

fn text(response: &Response) -> String {
    let resources = response.resources.iter().map(|r| format!("{}={}", r.name, r.version));
    let removed = response.removed.iter().map(|name| format!("-{name}"));
    [response.nonce.clone()].into_iter().chain(resources).chain(removed).collect::<Vec<_>>().join(" ")
}

fn is_nonce(word: &str) -> bool {
    word.split_once('-').is_some_and(|(a, b)| a.parse::<u64>().is_ok() && b.parse::<u64>().is_ok())
}

fn type_of(kind: &str) -> Option<Type> {
    match kind {
        "cds" => Some(Type::Cluster),
        "eds" => Some(Type::Endpoint),
        "lds" => Some(Type::Listener),
        "rds" => Some(Type::Route),
        _ => None,
    }
}

fn kind_of(url: &str) -> String {
    let short = ["cds", "eds", "lds", "rds"].into_iter().find(|kind| type_of(kind).unwrap().url() == url);
    short.unwrap_or(url).to_owned()
}

fn view(revision: u64, words: &[&str]) -> View {
    let mut resources = Resources::default();
    let mut current = Type::Cluster;
    for word in words {
        match (type_of(word), word.split_once('=')) {
            (Some(t), _) => current = t,
            (None, Some((name, version))) => {
                let of_type = resources.by_type.entry(current).or_default();
                of_type.insert(name.to_owned(), resource(name, version.parse().unwrap()));
            }
            (None, None) => panic!("what is `{word}`?"),
        }
    }
    View::new(revision, resources)
}
