//! The SpacetimeDB module that stores events from Pillarbox: one table and one function.
//!
//! This source is built twice: as `v1` for servers 1.x and as `v2` for servers 2.x, which spell the table attribute
//! differently and have procedures. To use it in your own module, copy the table, the enum and the functions.

use spacetimedb::{reducer, ReducerContext, SpacetimeType, Table};
#[cfg(feature = "v2")]
use spacetimedb::{procedure, ProcedureContext};

/// What `scope_id` identifies.
#[derive(SpacetimeType, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScopeKind {
    Site,
    Module,
    User,
    Profile,
}

/// One event. The table is private, so only the database's owner can read it; add `public` for all clients.
#[cfg_attr(
    feature = "v1",
    spacetimedb::table(name = tracking_event, index(name = by_time, btree(columns = [occurred_at_micros])))
)]
#[cfg_attr(
    feature = "v2",
    spacetimedb::table(accessor = tracking_event, index(accessor = by_time, btree(columns = [occurred_at_micros])))
)]
#[derive(Clone, Debug)]
pub struct TrackingEvent {
    #[primary_key]
    pub event_id: String,
    pub event_key: String,
    pub scope_kind: ScopeKind,
    pub scope_id: String,
    pub user_id: Option<String>,
    pub owner_user_id: Option<String>,
    pub profile_id: Option<String>,
    pub module_key: Option<String>,
    pub metadata_json: String,
    pub occurred_at_micros: i64,
}

/// How many invalid events one error names; the sender finds the others with its next call.
const NAMED_MAX: usize = 100;

/// Store a batch. Events whose `event_id` is already stored are skipped, so that sending a batch twice changes nothing.
///
/// All or nothing: invalid events reject the batch with `event[INDEX].FIELD: REASON` for each, separated by `; `.
#[reducer]
pub fn record_tracking_events(ctx: &ReducerContext, events: Vec<TrackingEvent>) -> Result<(), String> {
    record(ctx, events).map(|_| ())
}

/// The same, and return the number of events that were not stored before.
#[cfg(feature = "v2")]
#[procedure]
pub fn record_tracking_events_counted(ctx: &mut ProcedureContext, events: Vec<TrackingEvent>) -> Result<u32, String> {
    ctx.try_with_tx(|tx| record(tx, events.clone()))
}

fn record(ctx: &ReducerContext, events: Vec<TrackingEvent>) -> Result<u32, String> {
    let problems: Vec<String> = events
        .iter()
        .enumerate()
        .filter_map(|(index, event)| problem(event).map(|(field, reason)| format!("event[{index}].{field}: {reason}")))
        .take(NAMED_MAX)
        .collect();
    if !problems.is_empty() {
        return Err(problems.join("; "));
    }
    let mut inserted = 0;
    for event in events {
        if ctx.db.tracking_event().event_id().find(&event.event_id).is_none() {
            ctx.db.tracking_event().insert(event);
            inserted += 1;
        }
    }
    Ok(inserted)
}

/// Validate an event; add the rules that your application relies on.
fn problem(event: &TrackingEvent) -> Option<(&'static str, &'static str)> {
    let required = [
        ("event_id", &event.event_id),
        ("event_key", &event.event_key),
        ("scope_id", &event.scope_id),
        ("metadata_json", &event.metadata_json),
    ];
    required
        .into_iter()
        .find(|(_, text)| text.is_empty())
        .map(|(field, _)| (field, "must not be empty"))
}
