//! Scripted conversations with one ADS stream, and a property over random ones.
//!
//! A script has one event per line, and below it what the stream answers:
//!
//! ```text
//! view 5 cds a=1 b=1 eds a=1      the proxy should hold this, at revision 5
//! -> eds +a -b has c=1            the client subscribes, unsubscribes, says what it has (delta)
//! -> eds a b                      the client wants these names (state of the world)
//! -> cds ack | nack TEXT          the client answers the last response of the type
//! wait 500                        milliseconds pass
//! <- cds 5-1 a=1 b=1 -c           the stream sends this, and nothing else
//! synced 5                        the newest revision that the client has whole
//! cds nacked a                    what the status says about a type
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a script or a case that cannot be played fails its test"
)]

#[path = "stream/conversation.rs"]
mod conversation;
#[path = "stream/random.rs"]
mod random;
#[path = "stream/subscribing.rs"]
mod subscribing;

use conversation::{delta, whole};

#[test]
fn a_new_client_gets_clusters_then_endpoints_then_listeners_then_routes() {
    delta(
        "view 5 cds a=1 b=1 eds a=1 b=1 lds l=1 rds 80=1
         -> cds
         <- cds 5-1 a=1 b=1
         -> lds
         -> eds +a +b
         <- eds 5-2 a=1 b=1
         -> cds ack
         synced 0
         -> eds ack
         <- lds 5-3 l=1
         -> lds ack
         synced 0
         -> rds +80
         <- rds 5-4 80=1
         -> rds ack
         synced 5",
    );
}

#[test]
fn state_of_the_world_keeps_the_same_order() {
    whole(
        "view 5 cds a=1 b=1 eds a=1 b=1 lds l=1 rds 80=1
         -> cds
         <- cds 5-1 a=1 b=1
         -> lds
         -> eds a b
         <- eds 5-2 a=1 b=1
         -> cds ack
         -> eds a b ack
         <- lds 5-3 l=1
         -> lds ack
         -> rds 80
         <- rds 5-4 80=1
         -> rds 80 ack
         synced 5",
    );
}

#[test]
fn requests_before_the_first_view_are_answered_when_it_comes() {
    delta(
        "-> cds
         -> lds
         view 7 cds a=1 lds l=1
         <- cds 7-1 a=1
         -> cds ack
         <- lds 7-2 l=1
         -> lds ack
         synced 7",
    );
}

#[test]
fn an_empty_mesh_is_an_answer_too() {
    delta("view 3\n-> cds\n<- cds 3-1\n-> lds\n<- lds 3-2\n-> cds ack\n-> lds ack\nsynced 3");
    whole("view 3\n-> cds\n<- cds 3-1\n-> lds\n<- lds 3-2\n-> cds ack\n-> lds ack\nsynced 3");
}

#[test]
fn only_what_changed_is_sent_and_an_unchanged_view_is_synced_at_once() {
    delta(
        "view 1 cds a=1 b=1
         -> cds
         <- cds 1-1 a=1 b=1
         -> lds
         <- nothing
         -> cds ack
         <- lds 1-2
         -> lds ack
         synced 1
         view 2 cds a=1 b=2
         <- cds 2-3 b=2
         synced 1
         -> cds ack
         synced 2
         view 3 cds a=1 b=2
         synced 3",
    );
}

#[test]
fn a_slow_reader_gets_the_latest_and_no_backlog() {
    delta(
        "view 1 cds a=1
         -> cds
         <- cds 1-1 a=1
         view 2 cds a=2
         view 3 cds a=3
         view 4 cds a=4 b=1
         -> cds ack
         <- cds 4-2 a=4 b=1
         -> cds ack",
    );
    whole(
        "view 1 cds a=1
         -> cds
         <- cds 1-1 a=1
         view 2 cds a=2
         view 4 cds a=4 b=1
         -> cds ack
         <- cds 4-2 a=4 b=1
         -> cds ack",
    );
}

#[test]
fn a_change_that_is_taken_back_meanwhile_is_never_sent() {
    delta("view 1 cds a=1\n-> cds\n<- cds 1-1 a=1\nview 2 cds a=2\nview 3 cds a=1\n-> cds ack\n<- nothing");
}

#[test]
fn routes_to_a_new_cluster_wait_for_the_cluster_and_its_endpoints() {
    delta(
        "view 1 cds a=1 eds a=1 lds l=1 rds 80=1
         -> cds
         <- cds 1-1 a=1
         -> eds +a
         <- eds 1-2 a=1
         -> cds ack
         -> eds ack
         -> lds
         <- lds 1-3 l=1
         -> rds +80
         <- rds 1-4 80=1
         -> lds ack
         -> rds ack
         synced 1
         # route 80 now names cluster b
         view 2 cds a=1 b=1 eds a=1 b=1 lds l=1 rds 80=2
         <- cds 2-5 b=1
         -> cds ack
         synced 1
         -> eds +b
         <- eds 2-6 b=1
         -> eds ack
         <- rds 2-7 80=2
         -> rds ack
         synced 2",
    );
}

#[test]
fn a_client_that_does_not_want_the_endpoints_of_a_new_cluster_waits_only_so_long() {
    delta(
        "view 1 cds a=1 eds a=1 lds l=1
         -> cds
         <- cds 1-1 a=1
         -> lds
         -> cds ack
         wait 499
         synced 0
         wait 1
         <- lds 1-2 l=1
         -> lds ack
         synced 1",
    );
}

#[test]
fn a_cluster_is_removed_after_the_route_that_named_it() {
    delta(
        "view 1 cds a=1 b=1 lds l=1 rds 80=1
         -> cds
         <- cds 1-1 a=1 b=1
         -> cds ack
         -> lds
         <- lds 1-2 l=1
         -> rds +80
         <- rds 1-3 80=1
         -> lds ack
         -> rds ack
         synced 1
         view 2 cds a=1 lds l=1 rds 80=2
         <- rds 2-4 80=2
         synced 1
         -> rds ack
         <- cds 2-5 -b
         synced 1
         -> cds ack
         synced 2",
    );
}

#[test]
fn state_of_the_world_keeps_a_cluster_until_the_route_that_named_it_is_gone() {
    whole(
        "view 1 cds a=1 b=1 lds l=1 rds 80=1
         -> cds
         <- cds 1-1 a=1 b=1
         -> cds ack
         -> lds
         <- lds 1-2 l=1
         -> rds 80
         <- rds 1-3 80=1
         -> lds ack
         -> rds 80 ack
         view 2 cds a=1 c=1 lds l=1 rds 80=2
         <- cds 2-4 a=1 b=1 c=1
         -> cds ack
         <- rds 2-5 80=2
         -> rds 80 ack
         <- cds 2-6 a=1 c=1
         -> cds ack
         synced 2",
    );
}

#[test]
fn a_route_goes_after_the_listener_that_named_it() {
    delta(
        "view 1 lds l=1 m=1 rds 80=1 81=1
         -> lds
         <- lds 1-1 l=1 m=1
         -> rds +80 +81
         <- rds 1-2 80=1 81=1
         -> lds ack
         -> rds ack
         view 2 lds l=1 rds 80=1
         <- lds 2-3 -m
         -> lds ack
         <- rds 2-4 -81
         -> rds ack
         -> rds -81
         <- nothing",
    );
}

#[test]
fn endpoints_alone_are_pushed_alone() {
    delta(
        "view 1 cds a=1 eds a=1 lds l=1 rds 80=1
         -> cds
         <- cds 1-1 a=1
         -> eds +a
         <- eds 1-2 a=1
         -> cds ack
         -> eds ack
         -> lds
         <- lds 1-3 l=1
         -> lds ack
         -> rds +80
         <- rds 1-4 80=1
         -> rds ack
         view 2 cds a=1 eds a=2 lds l=1 rds 80=1
         <- eds 2-5 a=2
         # a route to known clusters does not wait for endpoints on their way
         view 3 cds a=1 eds a=2 lds l=1 rds 80=2
         <- rds 3-6 80=2
         -> eds ack
         -> rds ack
         synced 3",
    );
}

#[test]
fn a_named_nack_keeps_the_last_good_and_lets_the_rest_through() {
    delta(
        "view 1 cds a=1 b=1
         -> cds
         <- cds 1-1 a=1 b=1
         -> cds ack
         -> lds
         <- lds 1-2
         -> lds ack
         synced 1
         view 2 cds a=2 b=2
         <- cds 2-3 a=2 b=2
         -> cds nack cluster a: no such thing
         rejected cds 2 a
         <- cds 2-4 b=2
         -> cds ack
         synced 1
         cds nacked a
         # nothing is tried again until it changes
         view 3 cds a=2 b=2
         synced 1
         view 4 cds a=3 b=2
         <- cds 4-5 a=3
         -> cds ack
         synced 4
         cds synced",
    );
}

#[test]
fn a_rejected_resource_that_goes_back_to_the_last_good_is_synced() {
    delta(
        "view 1 cds a=1
         -> cds
         <- cds 1-1 a=1
         -> cds ack
         -> lds
         <- lds 1-2
         -> lds ack
         view 2 cds a=2
         <- cds 2-3 a=2
         -> cds nack a is bad
         rejected cds 2 a
         cds nacked a
         view 3 cds a=1
         synced 3
         cds synced",
    );
}

#[test]
fn a_nack_that_names_nothing_is_narrowed_down() {
    delta(
        "view 1 cds a=1 b=1 c=1 d=1
         -> cds
         <- cds 1-1 a=1 b=1 c=1 d=1
         -> cds nack something is wrong
         rejected cds 1 a b c d
         <- cds 1-2 a=1 b=1
         -> cds ack
         <- cds 1-3 c=1 d=1
         -> cds nack something is wrong
         rejected cds 1 c d
         <- cds 1-4 c=1
         -> cds nack something is wrong
         rejected cds 1 c
         <- cds 1-5 d=1
         -> cds ack
         cds nacked c",
    );
}

#[test]
fn state_of_the_world_sends_the_last_good_of_what_was_rejected() {
    whole(
        "view 1 cds a=1 b=1
         -> cds
         <- cds 1-1 a=1 b=1
         -> cds ack
         view 2 cds a=2 b=2
         <- cds 2-2 a=2 b=2
         -> cds nack cluster a: bad
         rejected cds 2 a
         <- cds 2-3 a=1 b=2
         -> cds ack
         cds nacked a
         view 3 cds a=3 b=2
         <- cds 3-4 a=3 b=2
         -> cds ack
         cds synced",
    );
}

#[test]
fn a_cluster_stays_while_a_rejected_route_keeps_the_one_that_names_it() {
    delta(
        "view 1 cds a=1 b=1 lds l=1 rds 80=1
         -> cds
         <- cds 1-1 a=1 b=1
         -> cds ack
         -> lds
         <- lds 1-2 l=1
         -> rds +80
         <- rds 1-3 80=1
         -> lds ack
         -> rds ack
         view 2 cds a=1 lds l=1 rds 80=2
         <- rds 2-4 80=2
         -> rds nack 80: bad
         rejected rds 2 80
         rds nacked 80
         view 3 cds a=1 lds l=1 rds 80=3
         <- rds 3-5 80=3
         -> rds ack
         <- cds 3-6 -b
         -> cds ack
         synced 3",
    );
}

#[test]
fn a_client_that_reconnects_is_sent_only_what_differs() {
    delta(
        "view 9 cds a=1 b=2 c=1 eds a=1 b=1 lds l=1
         -> cds has a=1 b=1 gone=1
         <- cds 9-1 b=2 c=1
         -> eds +a +b has a=1 b=1
         <- nothing
         -> lds has l=1
         -> cds ack
         <- cds 9-2 -gone
         -> cds ack
         wait 500
         synced 9",
    );
}

#[test]
fn a_client_that_reconnects_with_everything_is_sent_nothing() {
    delta(
        "view 9 cds a=1 b=2 eds a=1 b=1 lds l=1 rds 80=1
         -> cds has a=1 b=2
         -> eds +a +b has a=1 b=1
         -> lds has l=1
         -> rds +80 has 80=1
         synced 9
         view 10 cds a=1 b=2 eds a=2 b=1 lds l=1 rds 80=1
         <- eds 10-1 a=2
         -> eds ack
         synced 10",
    );
}

#[test]
fn state_of_the_world_with_the_same_content_is_not_sent_again() {
    let version = whole("view 9 cds a=1 b=2\n-> cds\n<- cds 9-1 a=1 b=2");
    whole(&format!(
        "view 11 cds a=1 b=2
         -> cds version {version}
         <- nothing
         -> lds
         <- lds 11-1
         -> lds ack
         synced 11
         view 12 cds a=1 b=3
         <- cds 12-2 a=1 b=3",
    ));
    whole(&format!("view 11 cds a=1 b=3\n-> cds version {version}\n<- cds 11-1 a=1 b=3"));
}
