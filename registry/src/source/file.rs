//! A folder of YAML files as a source of objects.
//!
//! [`Folder`] decides and does no IO; [`watch()`] looks at the folder in an interval and hands it what it found. Whose an
//! object is says an annotation, so that a member that starts knows what the folder put there before. Nothing is
//! concluded from doubt: a file that cannot be read or does not parse keeps its last good objects, a folder that is
//! missing or empty is unknown and not empty, and a file counts only when two looks in a row found it the same, for it
//! may be half written or about to be renamed.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::diff_objects;
use crate::config::{self, Object};
use crate::snapshot::Snapshot;
use crate::state::{Command, ObjectKey};

/// On every object of a folder: `file:FOLDER/NAME`.
pub const SOURCE_ANNOTATION: &str = "mesh.istio.io/source";
/// Files larger than this are not read, in bytes.
const MAX_FILE: u64 = 8 << 20;

/// Reads the text of a file, by its name, into objects; or tells every mistake.
pub type Parse = fn(&str, &str) -> Result<Vec<Object>, Vec<String>>;

/// What was found in a folder: the text of each file, or why it could not be read.
pub type Files = BTreeMap<String, Result<String, String>>;

/// Something about the folder that its owner should correct.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file; empty when it is about the folder.
    pub file: String,
    /// What is wrong, and what was done instead.
    pub message: String,
}

/// What follows from a look at the folder.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// The change to propose, if there is one.
    pub command: Option<Command>,
    /// What is wrong with the folder now.
    pub problems: Vec<Problem>,
}

/// A watched folder: what the last look found.
#[derive(Debug)]
pub struct Folder {
    name: String,
    parse: Parse,
    files: BTreeMap<String, File>,
    /// The last look found files.
    looked: bool,
}

#[derive(Debug)]
struct File {
    found: Result<String, String>,
    /// Two looks in a row found the same.
    settled: bool,
    /// What a settled file says; none until it settles.
    reading: Option<Result<Vec<Arc<Object>>, Vec<String>>>,
}

impl Folder {
    /// The folder of Istio's objects that is known by `name`, which must stay the same over restarts.
    #[must_use]
    pub fn of_objects(name: &str) -> Self {
        Self::new(name, |file, text| match config::parse(file, text) {
            Ok((objects, _)) => Ok(objects),
            Err(mistakes) => Err(mistakes.iter().map(ToString::to_string).collect()),
        })
    }

    /// A folder whose files are read by `parse`.
    #[must_use]
    pub fn new(name: &str, parse: Parse) -> Self {
        Self { name: name.to_owned(), parse, files: BTreeMap::new(), looked: false }
    }

    /// What follows from finding `files` (none: the folder could not be read), when `current` are all objects there are.
    pub fn look<'a>(
        &mut self,
        files: Option<Files>,
        current: impl IntoIterator<Item = &'a Arc<Object>>,
    ) -> Plan {
        let files = files.filter(|files| !files.is_empty());
        let first = !std::mem::replace(&mut self.looked, files.is_some());
        let Some(files) = files else {
            let message =
                "the folder cannot be read or has no YAML files; its objects stay as they are".to_owned();
            return Plan { command: None, problems: vec![Problem { file: String::new(), message }] };
        };
        let gone = self.files.keys().filter(|name| !files.contains_key(*name)).cloned().collect();
        let vanished = (!first).then_some(gone);
        self.files.retain(|name, _| files.contains_key(name));
        for (name, found) in files {
            self.see(name, found);
        }
        self.plan(vanished.as_ref(), current)
    }

    fn see(&mut self, name: String, found: Result<String, String>) {
        match self.files.get_mut(&name) {
            Some(file) if file.found == found => file.settled = true,
            Some(_) | None => {
                let file = File { found, settled: false, reading: None };
                self.files.insert(name.clone(), file);
            }
        }
        let (source, parse) = (self.source(&name), self.parse);
        let Some(file) = self.files.get_mut(&name).filter(|file| file.settled && file.reading.is_none())
        else {
            return;
        };
        file.reading = Some(match &file.found {
            Err(reason) => Err(vec![reason.clone()]),
            Ok(text) => parse(&name, text).map(|objects| {
                let marked = objects.into_iter().map(|mut object| {
                    object.annotations.insert(SOURCE_ANNOTATION.to_owned(), source.clone());
                    Arc::new(object)
                });
                marked.collect()
            }),
        });
    }

    /// `vanished`: the files that the last look found and this one did not; none when there was no last look.
    fn plan<'a>(
        &self,
        vanished: Option<&BTreeSet<String>>,
        current: impl IntoIterator<Item = &'a Arc<Object>>,
    ) -> Plan {
        let mut owned = BTreeMap::new();
        let mut foreign = BTreeSet::new();
        for object in current {
            let owner = object.annotations.get(SOURCE_ANNOTATION);
            if owner.is_some_and(|owner| self.file_of(owner).is_some()) {
                owned.insert(ObjectKey::of(object), Arc::clone(object));
            } else {
                foreign.insert(ObjectKey::of(object));
            }
        }
        let mut plan = Plan::default();
        let mut desired: BTreeMap<ObjectKey, Arc<Object>> = BTreeMap::new();
        for (name, file) in &self.files {
            let mut problem = |message: String| plan.problems.push(Problem { file: name.clone(), message });
            match &file.reading {
                None => {}
                Some(Err(mistakes)) => {
                    let told =
                        mistakes.iter().map(|mistake| format!("{mistake}; its last good objects stay"));
                    told.for_each(&mut problem);
                }
                Some(Ok(objects)) => {
                    for object in objects {
                        let key = ObjectKey::of(object);
                        if foreign.contains(&key) {
                            problem(format!("{key} was applied by somebody else and is left alone"));
                            continue;
                        }
                        match desired.entry(key) {
                            Entry::Vacant(free) => {
                                free.insert(Arc::clone(object));
                            }
                            Entry::Occupied(taken) => {
                                problem(format!("{} is in an earlier file too, which holds", taken.key()));
                            }
                        }
                    }
                }
            }
        }
        // Files in doubt keep what they had.
        for (key, object) in &owned {
            let owner = object.annotations.get(SOURCE_ANNOTATION).and_then(|owner| self.file_of(owner));
            let doubt = owner.is_some_and(|name| match self.files.get(name) {
                Some(file) => !matches!(file.reading, Some(Ok(_))),
                None => vanished.is_none_or(|vanished| vanished.contains(name)),
            });
            if doubt {
                desired.entry(key.clone()).or_insert_with(|| Arc::clone(object));
            }
        }
        plan.command = diff_objects(&owned, &desired);
        plan
    }

    fn source(&self, file: &str) -> String {
        format!("file:{}/{file}", self.name)
    }

    /// The file that an annotation names, if it is one of this folder.
    fn file_of<'o>(&self, owner: &'o str) -> Option<&'o str> {
        owner.strip_prefix("file:")?.strip_prefix(self.name.as_str())?.strip_prefix('/')
    }
}

/// Looks at the folder `path` every `every` and sends the changes to propose, until `stop`.
///
/// A full `commands` makes it wait; the next look sees the state as it is then.
pub async fn watch(
    mut folder: Folder,
    path: PathBuf,
    every: Duration,
    snapshot: watch::Receiver<Arc<Snapshot>>,
    commands: mpsc::Sender<Command>,
    stop: CancellationToken,
) {
    let mut looks = tokio::time::interval(every);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = Vec::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = looks.tick() => {}
        }
        let files = read(&path).await;
        let current = Arc::clone(&snapshot.borrow());
        let plan = folder.look(files, current.objects());
        if plan.problems != told {
            for problem in &plan.problems {
                tracing::warn!(folder = %path.display(), file = problem.file, problem = problem.message, "folder of configuration");
            }
            told = plan.problems;
        }
        let Some(command) = plan.command else { continue };
        tokio::select! {
            () = stop.cancelled() => return,
            sent = commands.send(command) => if sent.is_err() { return },
        }
    }
}

/// The YAML and JSON files directly in `path`; none when it cannot be listed.
async fn read(path: &Path) -> Option<Files> {
    let mut entries = tokio::fs::read_dir(path).await.ok()?;
    let mut files = Files::new();
    while let Some(entry) = entries.next_entry().await.ok()? {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let known = [".yaml", ".yml", ".json"].iter().any(|end| name.ends_with(end));
        if known && !name.starts_with('.') {
            files.insert(name, read_file(&entry.path()).await);
        }
    }
    Some(files)
}

async fn read_file(path: &Path) -> Result<String, String> {
    let size = tokio::fs::metadata(path).await.map_err(|error| format!("cannot be read: {error}"))?.len();
    if size > MAX_FILE {
        return Err(format!("is {size} bytes long, more than {MAX_FILE}"));
    }
    tokio::fs::read_to_string(path).await.map_err(|error| format!("cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Kind;
    use crate::state::{Batch, Revision, State};
    use serde_json::json;

    /// `name=value` per line; `!` is a mistake.
    fn parse(file: &str, text: &str) -> Result<Vec<Object>, Vec<String>> {
        let object = |line: &str| {
            let (name, value) =
                line.split_once('=').ok_or_else(|| vec![format!("{file}: {line}: no value")])?;
            Ok(Object::new(Kind::DestinationRule, "a", name, json!({"host": value})))
        };
        text.lines().map(object).collect()
    }

    struct World {
        folder: Folder,
        state: State,
    }

    impl World {
        fn new() -> Self {
            Self { folder: Folder::new("f", parse), state: State::default() }
        }

        /// Looks, applies what follows, and tells whether something did.
        fn look(&mut self, files: &[(&str, &str)]) -> bool {
            let files =
                files.iter().map(|(name, text)| ((*name).to_owned(), Ok((*text).to_owned()))).collect();
            self.found(Some(files)).0
        }

        fn found(&mut self, files: Option<Files>) -> (bool, Vec<String>) {
            let current: Vec<_> = self.state.objects().map(|(_, object)| Arc::clone(object)).collect();
            let plan = self.folder.look(files, &current);
            let problems = plan.problems.into_iter().map(|p| format!("{}: {}", p.file, p.message)).collect();
            let changed = plan.command.is_some();
            self.apply(plan.command);
            (changed, problems)
        }

        fn apply(&mut self, commands: impl IntoIterator<Item = Command>) {
            let commands = commands.into_iter().collect();
            let next = Revision(self.state.revision().0 + 1);
            self.state.apply(next, &Batch { time_ms: 0, author: String::new(), commands });
        }

        fn objects(&self) -> String {
            let told =
                |object: &Arc<Object>| format!("{}={}", object.name, object.raw["host"].as_str().unwrap());
            self.state.objects().map(|(_, object)| told(object)).collect::<Vec<_>>().join(" ")
        }
    }

    #[test]
    fn a_file_counts_when_two_looks_found_it_the_same() {
        let mut world = World::new();
        assert!(!world.look(&[("1.yaml", "x=1")]), "it may be half written");
        assert!(world.look(&[("1.yaml", "x=1")]));
        assert!(!world.look(&[("1.yaml", "x=1")]), "once");
        assert!(!world.look(&[("1.yaml", "x=1\ny=2")]));
        assert_eq!(world.objects(), "x=1", "meanwhile it keeps what it had");
        assert!(world.look(&[("1.yaml", "x=1\ny=2")]));
        assert_eq!(world.objects(), "x=1 y=2");
    }

    #[test]
    fn what_a_removed_file_declared_is_removed() {
        let mut world = World::new();
        let both = [("1.yaml", "x=1"), ("2.yaml", "y=2")];
        world.look(&both);
        world.look(&both);
        assert_eq!(world.objects(), "x=1 y=2");
        assert!(!world.look(&both[..1]), "it may be about to be renamed");
        assert!(world.look(&both[..1]));
        assert_eq!(world.objects(), "x=1");
    }

    #[test]
    fn a_file_with_mistakes_keeps_its_last_good_objects_also_after_a_restart() {
        let mut world = World::new();
        let good = [("1.yaml", "x=1"), ("2.yaml", "y=2")];
        world.look(&good);
        world.look(&good);
        let bad = [("1.yaml", "x"), ("2.yaml", "y=3")];
        world.look(&bad);
        world.look(&bad);
        assert_eq!(world.objects(), "x=1 y=3");
        world.folder = Folder::new("f", parse);
        world.look(&bad);
        world.look(&bad);
        assert_eq!(world.objects(), "x=1 y=3");
        world.folder = Folder::new("f", parse);
        assert!(!world.look(&bad[..1]), "a file that a restarted member does not see yet");
        let files = bad.iter().map(|(name, text)| ((*name).to_owned(), Ok((*text).to_owned()))).collect();
        assert_eq!(world.found(Some(files)).1, ["1.yaml: 1.yaml: x: no value; its last good objects stay"]);
    }

    #[test]
    fn a_missing_or_empty_folder_is_unknown_and_not_empty() {
        let mut world = World::new();
        world.look(&[("1.yaml", "x=1")]);
        world.look(&[("1.yaml", "x=1")]);
        for files in [None, Some(Files::new()), None] {
            let (changed, problems) = world.found(files);
            assert!(!changed && problems.len() == 1, "{problems:?}");
        }
        let unreadable = || Some(Files::from([("1.yaml".to_owned(), Err("cannot be read: x".to_owned()))]));
        world.found(unreadable());
        assert_eq!(
            world.found(unreadable()),
            (false, vec!["1.yaml: cannot be read: x; its last good objects stay".into()])
        );
        assert_eq!(world.objects(), "x=1");
    }

    #[test]
    fn objects_of_others_are_left_alone_and_the_first_file_holds() {
        let mut world = World::new();
        let theirs = Object::new(Kind::DestinationRule, "a", "x", json!({"host": "theirs"}));
        world.apply(Batch::put_objects(0, "", [theirs]).commands);
        let files = [("1.yaml", "x=mine\ny=1"), ("2.yaml", "y=2")];
        world.look(&files);
        world.look(&files);
        assert_eq!(world.objects(), "x=theirs y=1");
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), Ok((*text).to_owned()))).collect();
        let told = world.found(Some(files)).1;
        assert!(told[0].contains("DestinationRule/a/x was applied by somebody else"), "{told:?}");
        assert!(told[1].contains("DestinationRule/a/y is in an earlier file"), "{told:?}");
    }

    #[test]
    fn istios_objects_are_read_and_mistakes_told_with_their_place() {
        let mut folder = Folder::of_objects("f");
        let good = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: r}\nspec: {host: x}\n";
        let bad = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: s}\nspec: {hst: x}\n";
        let files = || {
            let texts = [("bad.yaml", bad), ("good.yaml", good)];
            Some(texts.map(|(name, text)| (name.to_owned(), Ok(text.to_owned()))).into_iter().collect())
        };
        let none: [Arc<Object>; 0] = [];
        folder.look(files(), &none);
        let plan = folder.look(files(), &none);
        let Some(Command::Change { puts, .. }) = plan.command else { panic!("{plan:?}") };
        assert_eq!(puts.iter().map(|put| put.object.id()).collect::<Vec<_>>(), ["DestinationRule/default/r"]);
        let placed = plan.problems.iter().any(|p| p.message.starts_with("bad.yaml:4:8: spec.hst"));
        assert!(placed, "{:?}", plan.problems);
    }

    #[tokio::test]
    async fn a_watched_folder_sends_what_it_finds() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("1.yaml"), "x=1").unwrap();
        std::fs::write(dir.path().join(".hidden.yaml"), "z=1").unwrap();
        std::fs::write(dir.path().join("notes.txt"), "z=1").unwrap();
        let (_writer, snapshot) = watch::channel(Arc::new(Snapshot::default()));
        let (send, mut commands) = mpsc::channel(1);
        let stop = CancellationToken::new();
        let path = dir.path().to_owned();
        let every = Duration::from_millis(2);
        let running = watch(Folder::new("f", parse), path, every, snapshot, send, stop.clone());
        let test = async {
            let deadline = Duration::from_secs(20);
            let command = tokio::time::timeout(deadline, commands.recv()).await.unwrap().unwrap();
            let Command::Change { puts, deletes } = command else { panic!("{command:?}") };
            assert_eq!((puts.len(), deletes.len()), (1, 0));
            assert_eq!(puts[0].object.annotations[SOURCE_ANNOTATION], "file:f/1.yaml");
            stop.cancel();
        };
        tokio::join!(running, test);
    }
}
